"""The generator of one batch beside the decoder of the batch before, on two streams of a GPU.

    stream of tokens     | tokens of batch 1 | tokens of batch 2   | tokens of batch 3   |
    stream of pictures                       | pictures of batch 1 | pictures of batch 2 | pictures of batch 3 |

Pictures wait for the tokens that they are decoded from. Tokens wait for nothing of the batch before. Each stage has its
own graphs and its own memory pool, so together they need the memory of both at once.

The stages may take batches of different sizes. A generator reads few tokens of a sample, so it needs many samples to
fill a GPU, while the feature maps of a pixel decoder limit how many pictures fit into its memory.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from titok.generation.captured import BUCKETS, PictureDecoder, bucket
from titok.generation.request import GenerationRequest
from titok.inference import fused_linear
from titok.inference.cuda_graphs import CapturedGraph, GraphCache
from titok.inference.prepared import weights_of
from titok.profiling import annotate


class TwoStages:
    """Turns requests into pictures in two stages. Within `with`, each call launches the work of one batch.

    Args:
        draw: a request to its tokens (B, K).
        decode: tokens (n, K) to pictures (n, H, W, channels).
        device: of both.
        decode_batch_size: tokens of so many samples are decoded at once.

    Attributes:
        picture_stream: on which pictures are computed; None on a CPU, which does one stage after the other.
    """

    def __init__(
        self,
        draw: Callable[[GenerationRequest], Tensor],
        decode: Callable[[Tensor], Tensor],
        device: torch.device,
        decode_batch_size: int,
    ) -> None:
        self._draw, self._decode, self._decode_batch_size = draw, decode, decode_batch_size
        on_gpu = device.type == "cuda"
        self._device = device
        self._token_stream = torch.cuda.Stream(device) if on_gpu else None
        self.picture_stream = torch.cuda.Stream(device) if on_gpu else None

    def __enter__(self) -> TwoStages:
        return self

    def __exit__(self, *error: object) -> None:
        """The current stream waits for all work, so that memory which it frees is not in use any more."""
        for stream in (self._token_stream, self.picture_stream):
            if stream is not None:
                torch.cuda.current_stream(self._device).wait_stream(stream)

    def __call__(self, request: GenerationRequest) -> Tensor:
        """The pictures of a request (B, H, W, channels), on `picture_stream`."""
        if self._token_stream is not None:  # the caller may have written weights
            self._token_stream.wait_stream(torch.cuda.current_stream(self._device))
        with _on(self._token_stream):
            tokens = self._draw(request)
        if self.picture_stream is not None and self._token_stream is not None:
            self.picture_stream.wait_stream(self._token_stream)
            tokens.record_stream(self.picture_stream)
        with _on(self.picture_stream):
            parts = [self._decode(some) for some in tokens.split(self._decode_batch_size)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        yield


class StaticPictures:
    """The decoder over a buffer of tokens, captured as a graph.

    Args:
        size: samples that the buffer holds.
        graphs: captures the graph, which needs a CUDA device. With None, for tests without a GPU, the pictures are
            computed from the same buffer each time.

    Raises:
        RuntimeError: the capture fails.
    """

    def __init__(self, decoder: PictureDecoder, size: int, graphs: GraphCache | None = None) -> None:
        self._decoder = decoder
        length, device = decoder.tokenizer.config.num_latent_tokens, decoder.tokenizer.device
        with torch.inference_mode(False):  # a buffer that is made within inference mode is written outside of it
            self._tokens = torch.zeros(size, length, dtype=torch.int64, device=device)
            self._counters = fused_linear.new_counters(device)
        self._graph: CapturedGraph | None = None
        if graphs is not None:
            self._graph = graphs.capture(self._compute, device)

    def run(self, tokens: Tensor) -> Tensor:
        """tokens (n, K) int64, at most as many as the buffer holds, to pictures (n, H, W, channels) uint8."""
        self._tokens[: len(tokens)].copy_(tokens)
        if self._graph is None:
            return self._compute()[: len(tokens)]
        with annotate("graph of the decoder"):
            self._graph.replay()
        return self._graph.result[: len(tokens)].clone()

    def _compute(self) -> Tensor:
        with fused_linear.counters(self._counters):
            return self._decoder(self._tokens)


def pictures_captured(
    decoder: PictureDecoder, tokens: Tensor, graphs: GraphCache, *, capture: bool = True
) -> Tensor:
    """Decodes tokens by replays of graphs, of at most `BUCKETS[-1]` samples each.

    Where the capture of a graph fails, it warns once and decodes without that graph from then on.

    Args:
        tokens: (B, K) int64 of at least one sample.
        graphs: where the graphs are kept.
        capture: False runs the same code without graphs, for tests without a GPU.

    Returns:
        pictures (B, H, W, channels) uint8.
    """

    def make(size: int) -> StaticPictures | None:
        try:
            return StaticPictures(decoder, size, graphs if capture else None)
        except torch.OutOfMemoryError:
            raise  # the capture of a smaller batch may succeed
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"titok: decoding without a CUDA graph, its capture failed: {reason}", stacklevel=4)
            return None

    pictures = []
    with graphs.exclusive(decoder.tokenizer.device):
        for some in tokens.split(BUCKETS[-1]):
            size = bucket(len(some))
            static = graphs.get((size, decoder), functools.partial(make, size), weights_of(decoder.tokenizer))
            pictures.append(decoder(some) if static is None else static.run(some))
    return pictures[0] if len(pictures) == 1 else torch.cat(pictures)
