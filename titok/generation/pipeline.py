"""Labels to pictures: a generator and the tokenizer whose tokens it was trained on."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from titok.checkpoints.hub import upload
from titok.config import Rounding, SamplingConfig
from titok.data.images import to_uint8
from titok.generation.batches import BatchSize, check_batch_size, check_count, generate_batches, one_by_one
from titok.generation.captured import PictureDecoder, can_capture, decode_captured, is_captured
from titok.generation.request import GenerationRequest
from titok.generation.sampling import draw_tokens
from titok.generation.stopwatch import Stopwatch
from titok.generation.two_stages import TwoStages, pictures_captured
from titok.inference.cuda_graphs import GraphCache
from titok.inference.dtypes import Dtype, choose_dtype
from titok.inference.prepared import select
from titok.inference.workspace import Workspace
from titok.models.generator import MaskGIT
from titok.models.tokenizer import TiTok
from titok.ops import last_backends
from titok.profiling import annotate, ranged


class Pipeline:
    """`Pipeline(tokenizer, generator)(labels)` generates pictures.

    The pipeline prepares its models for inference (`TiTok.prepare`), when it is made and at each call: from then on
    their weights cannot be read or written, except by what gives the weights back first, such as `unprepare()`,
    `train()` or `state_dict()`. A model in training mode and one that `torch.compile` returned are used as they are;
    no dropout is applied.

    Args:
        engine: "fast", or "plain" to compute as the models do in training, without prepared weights, kernels of
            titok and CUDA graphs. "plain" is slower, and is there to check "fast" against.
        prepare: False leaves the models as they are, for `torch.compile` and for weights that are to be changed.
        dtype: "int8" quantises the linear layers of the transformers to 8 bits (`TiTok.prepare(int8=True)`), on CPUs
            with AVX-512 VNNI. It is faster than bfloat16 and less exact; the original weights of both models are lost.
            None computes in the dtype of the models.

    Raises:
        TypeError: tokenizer or generator is another kind of object.
        RuntimeError: `dtype="int8"` with a model in training mode, or with weights that somebody else holds too.
        ValueError: tokenizer and generator differ in token count, codebook size or device; the tokenizer cannot
            decode to pictures; there is no such engine; or 8 bits are asked for where they cannot be computed fast, or
            together with `engine="plain"` or `prepare=False`.
    """

    tokenizer: TiTok
    generator: MaskGIT

    def __init__(
        self,
        tokenizer: TiTok,
        generator: MaskGIT,
        *,
        engine: Literal["fast", "plain"] = "fast",
        prepare: bool = True,
        dtype: Literal["int8"] | None = None,
    ) -> None:
        select(engine)  # checks the name
        _check_precision(dtype, engine, prepare)
        for name, model, kind in (("tokenizer", tokenizer, TiTok), ("generator", generator, MaskGIT)):
            if not isinstance(getattr(model, "_orig_mod", model), kind):  # torch.compile wraps a model
                raise TypeError(f"{name}: expected a {kind.__name__}, got {type(model).__name__}")
        t, g = tokenizer.config, generator.config
        if t.bottleneck != "vq":
            raise ValueError("tokenizer: expected a vector-quantised one, got a VAE: MaskGIT generates codes")
        if t.head == "proxy" and not t.pixel_decoder:
            raise ValueError("tokenizer: expected one that decodes to pictures, got one that ends at proxy logits")
        if (t.num_latent_tokens, t.codebook_size) != (g.num_latent_tokens, g.codebook_size):
            wanted = f"{g.num_latent_tokens} tokens of {g.codebook_size} codes, as the generator"
            raise ValueError(f"tokenizer: expected {wanted}, got {t.num_latent_tokens} of {t.codebook_size}")
        if tokenizer.device != generator.device:
            raise ValueError(
                f"tokenizer: expected on {generator.device}, as the generator, got {tokenizer.device}"
            )
        self.tokenizer, self.generator, self.engine = tokenizer, generator, engine
        self._graphs = GraphCache()  # from labels to pictures
        self._picture_graphs = GraphCache()  # from tokens to pictures
        self._workspace = Workspace()
        self._prepares = prepare and engine == "fast"
        if dtype == "int8":
            for model in (tokenizer, generator):
                model.prepare(int8=True)
        self._prepare()
        self._stopwatch = Stopwatch(tokenizer.device)

    @classmethod
    def from_pretrained(
        cls,
        tokenizer: str | os.PathLike[str],
        generator: str | os.PathLike[str] | None = None,
        *,
        dtype: Dtype = "auto",
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        engine: Literal["fast", "plain"] = "fast",
        prepare: bool = True,
    ) -> Pipeline:
        """Both models from folders, files or repository ids.

        Args:
            tokenizer: as `TiTok.from_pretrained` takes it.
            generator: as `MaskGIT.from_pretrained` takes it. None takes both models from one folder or repository,
                which `Pipeline.save_pretrained` or `Pipeline.push_to_hub` wrote.
            revision, token, cache_dir, local_files_only: of the repositories, as `TiTok.from_pretrained` takes them.
            dtype: of the networks; "auto" is bfloat16 on a GPU that multiplies it, and float32 on any other device.
                "int8" is as for `Pipeline`, with the rest in bfloat16 on a CPU that multiplies it, else in float32.
            device: of both models.

        Raises:
            TypeError: `dtype` is neither a dtype nor "auto" nor "int8".
            As `TiTok.from_pretrained` and `Pipeline`.
        """
        _check_precision("int8" if dtype == "int8" else None, engine, prepare)
        subfolders = (None, None) if generator is not None else ("tokenizer", "generator")
        options: dict[str, Any] = {
            "dtype": choose_dtype(dtype, device), "device": device, "prepare": prepare and engine == "fast",
            "int8": dtype == "int8",
            "revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only,
        }  # fmt: skip
        return cls(
            TiTok.from_pretrained(tokenizer, subfolder=subfolders[0], **options),
            MaskGIT.from_pretrained(
                tokenizer if generator is None else generator, subfolder=subfolders[1], **options
            ),
            engine=engine,
            prepare=prepare,
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes both models into the sub-folders `tokenizer` and `generator`, for `Pipeline.from_pretrained`."""
        self.tokenizer.save_pretrained(Path(directory, "tokenizer"))
        self.generator.save_pretrained(Path(directory, "generator"))

    def push_to_hub(self, repo: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads both models and a model card, as `TiTok.push_to_hub` does; returns the address of the commit."""
        models = {"tokenizer": self.tokenizer, "generator": self.generator}
        return upload(models, repo, private=private, token=token)

    def to(self, device: str | torch.device) -> Pipeline:
        """Moves both models to a device, frees what the pipeline holds on the former one, and returns the pipeline."""
        self.release()
        self.tokenizer.to(device)
        self.generator.to(device)
        self._prepare()
        return self

    def _prepare(self) -> None:
        """Prepares the models that are in eval mode, if the pipeline may."""
        if not self._prepares or torch.compiler.is_compiling():
            return
        for model in (self.tokenizer, self.generator):
            if isinstance(model, (TiTok, MaskGIT)) and not model.training:  # no model that torch.compile wraps
                model.prepare()

    def __call__(
        self,
        labels: Tensor | Sequence[int],
        *,
        seed: int = 0,
        first_sample: int = 0,
        sampling: SamplingConfig | None = None,
        rounding: Rounding = "nearest",
    ) -> Tensor:
        """Generates one picture for each label.

        Args:
            labels, seed, first_sample, sampling: as `sample_tokens` takes them.
            rounding: to 8 bits, "nearest", or "truncate" as the published FID script does.

        Returns:
            (B, H, W, channels) uint8 on the models' device.

        Raises:
            TypeError, ValueError: as `sample_tokens`, or an unknown `rounding`.
        """
        return self.generate(
            GenerationRequest.checked(
                self.generator.config,
                labels,
                seed=seed,
                first_sample=first_sample,
                sampling=sampling,
                rounding=rounding,
            )
        )

    @torch.no_grad()
    @ranged("generate")
    def generate(self, request: GenerationRequest) -> Tensor:
        """The pictures of a request, (B, H, W, channels) uint8 on the models' device."""
        stopwatch = self._stopwatch = Stopwatch(self.tokenizer.device)
        self._prepare()
        with select(self.engine):
            if is_captured(self.generator, request):
                with stopwatch.stage("generate"):
                    picture_decoder = PictureDecoder(self.tokenizer, request.rounding)
                    return decode_captured(self.generator, request, self._graphs, picture_decoder)
            with stopwatch.stage("generator"), annotate("sample tokens"):
                tokens = draw_tokens(self.generator, request)
            return self._decode(tokens, request.rounding)

    def _decode(self, tokens: Tensor, rounding: Rounding) -> Tensor:
        """The pictures of tokens (B, K), without a graph."""
        stopwatch = self._stopwatch
        with annotate("detokenize"):
            with stopwatch.stage("decoder"):
                prediction = self.tokenizer.decode_head(tokens)
            with stopwatch.stage("pixel decoder"):
                images = self.tokenizer.decode_pixels(prediction, self._workspace)
        with stopwatch.stage("to 8 bits"):
            return to_uint8(images, rounding)

    def generate_many(
        self,
        labels: Tensor | Sequence[int],
        *,
        batch_size: BatchSize = "auto",
        decode_batch_size: int | None = None,
        seed: int = 0,
        first_sample: int = 0,
        sampling: SamplingConfig | None = None,
        rounding: Rounding = "nearest",
        progress: bool | None = None,
    ) -> Iterator[Tensor]:
        """Generates one picture for each label in the memory of two batches, however many labels there are.

        A GPU computes the next batch while the caller uses the pictures of the last one. The pictures are those of
        one call with all labels, whatever the batch size: tokens are equal (see `sample_tokens`), and a level of 8
        bits may differ by one where matrix products round differently for another batch size. A run that was
        stopped after k pictures goes on with `labels[k:]` and `first_sample=k`.

        Args:
            batch_size: "auto" doubles it for as long as that is faster and fits into memory.
            decode_batch_size: decodes so many pictures at once, and on a GPU draws the tokens of the next batch
                beside that, on a second stream (`titok.generation.two_stages`). None decodes a batch at once, after its
                tokens were drawn. Which of the two is faster has not been measured on a GPU.
            progress: show a progress bar on stderr; None shows it where that is a terminal.
            labels, seed, first_sample, sampling, rounding: as when the pipeline is called.

        Returns:
            an iterator over the pictures in the order of the labels, each (H, W, channels) uint8 on the CPU.

        Raises:
            TypeError, ValueError: as when the pipeline is called, or a bad batch size; before the first picture.
        """
        request = GenerationRequest.checked(
            self.generator.config,
            labels,
            seed=seed,
            first_sample=first_sample,
            sampling=sampling,
            rounding=rounding,
        )
        return one_by_one(
            self.generate_batches(
                request, batch_size=batch_size, decode_batch_size=decode_batch_size, progress=progress
            )
        )

    def generate_batches(
        self,
        request: GenerationRequest,
        *,
        batch_size: BatchSize = "auto",
        decode_batch_size: int | None = None,
        progress: bool | None = None,
    ) -> Iterator[Tensor]:
        """`generate_many` for a request, in batches (B, H, W, channels) uint8 on the CPU."""
        size, device = check_batch_size(batch_size), self.tokenizer.device
        if decode_batch_size is None:
            return generate_batches(self.generate, request, device=device, batch_size=size, progress=progress)
        at_once = check_count("decode_batch_size", decode_batch_size)
        stages = TwoStages(self._draw, functools.partial(self._decode_stage, request.rounding), device, at_once)
        return self._in_two_stages(stages, request, size, progress)

    def _in_two_stages(
        self, stages: TwoStages, request: GenerationRequest, size: BatchSize, progress: bool | None
    ) -> Iterator[Tensor]:
        with stages:
            yield from generate_batches(
                stages,
                request,
                device=self.tokenizer.device,
                batch_size=size,
                progress=progress,
                stream=stages.picture_stream,
            )

    @torch.no_grad()
    def _draw(self, request: GenerationRequest) -> Tensor:
        """The first of two stages: the tokens of a request."""
        stopwatch = self._stopwatch = Stopwatch(self.tokenizer.device)
        self._prepare()
        with select(self.engine), stopwatch.stage("generator"), annotate("sample tokens"):
            return draw_tokens(self.generator, request)

    @torch.no_grad()
    def _decode_stage(self, rounding: Rounding, tokens: Tensor) -> Tensor:
        """The second of two stages: the pictures of tokens."""
        with select(self.engine):
            if not can_capture(self.generator):
                return self._decode(tokens, rounding)
            with self._stopwatch.stage("decoder"):
                return pictures_captured(PictureDecoder(self.tokenizer, rounding), tokens, self._picture_graphs)

    def stats(self) -> dict[str, Any]:
        """About the latest call: `"seconds"` by stage, and `"backends"`, the back end that each op ran on last.

        `"dtype"` is that of the models, or "int8" where layers of them were quantised.

        With CUDA graphs, "generate" is the only stage. On a GPU this waits for the call to end.
        """
        precisions = [self.generator.precision, self.tokenizer.precision]
        dtype = "int8" if "int8" in precisions else precisions[0]
        return {"seconds": self._stopwatch.seconds(), "backends": last_backends(), "dtype": dtype}

    def release(self) -> None:
        """Frees the memory that calls share: on a CPU that of feature maps, on a GPU the captured CUDA graphs.

        The graphs also hold the memory of the weights that they read, until the next call finds other weights. So
        call this to free a GPU whose models were moved away. The next call takes new memory.
        """
        self._workspace.release()
        self._graphs.clear()
        self._picture_graphs.clear()
        self.generator.graphs.clear()


def _check_precision(dtype: str | None, engine: str, prepare: bool) -> None:
    """Raises where 8 bits are asked for, or something else is by that argument, and the pipeline may not prepare."""
    if dtype not in (None, "int8"):
        raise ValueError(f"dtype: expected None or 'int8', got {dtype!r}")
    if dtype == "int8" and (engine != "fast" or not prepare):
        raise ValueError(
            f"dtype: expected 'int8' with engine='fast' and prepare=True, got engine={engine!r} and prepare={prepare}"
        )
