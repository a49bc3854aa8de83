"""`titok.nn.EMAVectorQuantizer` against vector-quantize-pytorch and against its definition, written as loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titok.nn import EMAVectorQuantizer


def defined_update(
    codebook: Tensor, usage: Tensor, sums: Tensor, latents: Tensor, decay: float, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """van den Oord et al. 2017, equations 6 to 8, with smoothed usages, in float64 and one latent after the other."""
    codebook, usage, sums = codebook.double(), usage.double(), sums.double()
    counts, totals = torch.zeros_like(usage), torch.zeros_like(sums)
    for z in latents.double():
        nearest = (codebook - z).square().sum(-1).argmin()
        counts[nearest] += 1
        totals[nearest] += z
    usage = decay * usage + (1 - decay) * counts
    sums = decay * sums + (1 - decay) * totals
    smoothed = (usage + eps) / (usage.sum() + len(usage) * eps) * usage.sum()
    return sums / smoothed[:, None], usage, sums


def test_updates_are_those_of_the_definition() -> None:
    module = EMAVectorQuantizer(20, 6, decay=0.9)
    state = tuple(x.clone() for x in (module.codebook, module.usage, module.sums))
    for _ in range(5):
        latents = torch.randn(3, 17, 6)
        module(latents)
        state = defined_update(*state, latents.flatten(0, 1), 0.9)
        for got, want in zip((module.codebook, module.usage, module.sums), state, strict=True):
            torch.testing.assert_close(got, want.float())


def test_padding_and_feature_maps() -> None:
    modules = [EMAVectorQuantizer(20, 6, dim=dim, restart_below=0.1) for dim in (1, -1)]
    modules[1].load_state_dict(modules[0].state_dict())
    maps, mask = torch.randn(2, 6, 4, 5), torch.rand(2, 4, 5) < 0.7
    maps = maps.masked_fill(~mask[:, None], float("nan"))
    got, want = modules[0](maps, mask), modules[1](maps.movedim(1, -1)[mask])
    assert torch.equal(got.indices[mask], want.indices)
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())


def test_nothing_changes_in_eval_mode_and_by_padding_alone() -> None:
    module = EMAVectorQuantizer(20, 6, restart_below=2.0).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(torch.randn(50, 6))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    module.train()(torch.randn(50, 6), torch.zeros(50, dtype=torch.bool))
    assert torch.isfinite(module.codebook).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_dead_codes_become_latents(normalize: bool) -> None:
    module = EMAVectorQuantizer(20, 6, restart_below=0.4, decay=0.5, normalize=normalize)
    with torch.no_grad():
        module.codebook[10:] = module.codebook[0]  # of equal codes the first is chosen
        module.usage[10:] = 0
        module.sums[10:] = 0
    mask = torch.arange(40) < 30
    latents = torch.randn(40, 6)
    shown = torch.nn.functional.normalize(latents, dim=-1) if normalize else latents
    module(latents, mask)
    restarted = module.usage == 0.4
    assert restarted.tolist() == [False] * 10 + [True] * 10
    for code in module.codebook[restarted]:
        assert (shown[:30] == code).all(-1).any()


@pytest.mark.parametrize("normalize", [False, True])
def test_three_steps_of_vector_quantize_pytorch(normalize: bool) -> None:
    other = pytest.importorskip("vector_quantize_pytorch")
    theirs = other.VectorQuantize(
        dim=6, codebook_size=20, decay=0.9, use_cosine_sim=normalize, rotation_trick=False, straight_through=False
    ).train()
    ours = EMAVectorQuantizer(20, 6, decay=0.9, normalize=normalize)
    with torch.no_grad():
        ours.codebook.copy_(theirs.codebook)
        ours.sums.copy_(theirs._codebook.embed_avg[0])
        ours.usage.copy_(theirs._codebook.cluster_size[0])
    for _ in range(3):
        latents = torch.randn(3, 17, 6)
        _, indices, _ = theirs(latents)
        assert torch.equal(ours(latents).indices, indices)
        torch.testing.assert_close(ours.codebook, theirs.codebook)
        torch.testing.assert_close(ours.usage, theirs._codebook.cluster_size[0])


def test_wrong_arguments() -> None:
    for change in ({"decay": 1.0}, {"decay": -0.1}, {"restart_below": -1}, {"eps": -1}, {"commitment_cost": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}: expected a number"):
            EMAVectorQuantizer(5, 6, **change)
    with pytest.raises(ValueError, match=r"codebook_size, code_dim: expected integers >= 1, got 0 and 6"):
        EMAVectorQuantizer(0, 6)


@pytest.mark.slow
def test_a_training_step_compiles_as_one_graph() -> None:
    modules = [EMAVectorQuantizer(20, 6, dim=1, restart_below=1e-3) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    maps = torch.randn(2, 6, 4, 5)
    compiled = torch.compile(modules[0], fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(tuple(compiled(maps)), tuple(modules[1](maps)))
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())
