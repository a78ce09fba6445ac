from typing import Any

import pytest
import torch

from sabrage.attention.multi_head import MultiHead
from sabrage.attention.rotary import Rotary
from sabrage.context import Context
from sabrage.kernels import rotary_norm as room
from sabrage.kernels.language import KernelError
from sabrage.kernels.rotary_norm import rotary_norm, rotary_norm_reference
from sabrage.norms import rms_norm

PARTIAL = {"rotary": Rotary(share=0.5), "key_offset": True}
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)


def heads() -> torch.Tensor:
    """Queries, keys and values of two heads each."""
    return torch.randn(2, 6, 6, 16, generator=torch.Generator().manual_seed(0))


def test_the_reference_is_the_norm_and_rotation_of_the_attention_room() -> None:
    tables = Rotary().build(16)
    q, k, v = heads().chunk(3, dim=2)
    found = rotary_norm_reference(heads(), tables.cosine_TK[:6], tables.sine_TK[:6], addend_BTHK=q)
    torch.testing.assert_close(found, (tables(rms_norm(q)), tables(rms_norm(k)), v + q))


@interpreted
def test_every_head_keeps_unit_root_mean_square() -> None:
    tables = Rotary().build(16)
    for found in rotary_norm(heads(), tables.cosine_TK[:6], tables.sine_TK[:6])[:2]:
        torch.testing.assert_close(found.square().mean(-1), torch.ones(2, 6, 2), rtol=1e-4, atol=0)


@interpreted
@pytest.mark.parametrize("valued", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"rotary": Rotary(share=0.5)}, PARTIAL], ids=["", "partial", "offset"]
)
def test_attention_with_the_kernel_equals_attention_without(changes: dict[str, Any], valued: bool) -> None:
    x_BTD = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    pull_BTD = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for backend in ("plain", "triton"):
        torch.manual_seed(0)
        mixer = MultiHead(heads=2, qk_norm=True, rotary_backend=backend, **changes).build(dim=32, layer=0)
        leaf_BTD, values_BTD = x_BTD.clone().requires_grad_(), pull_BTD.clone().requires_grad_()
        y_BTD = mixer(leaf_BTD, Context(values_BTD=values_BTD if valued else None))
        y_BTD.backward(pull_BTD)
        found.append((y_BTD.detach(), leaf_BTD.grad, mixer.qkv.weight.grad, values_BTD.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_the_kernel_is_for_normalised_heads_of_one_projection() -> None:
    for part in (
        MultiHead(heads=2, rotary_backend="auto"),
        MultiHead(heads=2, qk_norm=True, kv_heads=1, rotary_backend="triton"),
    ):
        assert any("rotary_backend" in sentence for sentence in part.problems())


@interpreted
def test_the_registration_of_the_operation_is_sound() -> None:
    tables = Rotary().build(16)
    angles = (tables.cosine_TK[:6], tables.sine_TK[:6])
    addend = torch.zeros(2, 6, 2, 16, requires_grad=True)
    for added in (addend, None):
        torch.library.opcheck(room._forward, (heads().requires_grad_(), *angles, added, 1e-6))


def test_tables_of_another_length_are_refused() -> None:
    tables = Rotary().build(16)
    with pytest.raises(KernelError, match=r"tables of \(T, K / 2\)"):
        rotary_norm(heads(), tables.cosine_TK, tables.sine_TK)


def test_other_shapes_are_refused() -> None:
    tables = Rotary().build(16)
    angles = (tables.cosine_TK[:6], tables.sine_TK[:6])
    with pytest.raises(KernelError, match="three times as many heads"):
        rotary_norm(heads()[:, :, :5], *angles)
    with pytest.raises(KernelError, match=r"allowed: \(2, 6, 2, 16\)"):
        rotary_norm(heads(), *angles, addend_BTHK=heads())
