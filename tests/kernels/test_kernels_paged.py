"""Decoding over pages: what is not used never shows, however the work is divided."""

import math

import pytest
import torch

from sabrage.kernels import paged_attention, paged_latent, split
from sabrage.kernels.language import KernelError
from sabrage.kernels.paged_attention import decode_heads, decode_heads_reference
from sabrage.kernels.paged_cases import scattered_pages
from sabrage.kernels.paged_latent import decode, decode_reference

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)
RAGGED = (70, 0, 1, 64)


def latents(*lengths: int, queries: int = 2, heads: int = 2) -> tuple:
    """(q, pages, table, lengths, value width, scale) with NaN wherever the cache holds nothing."""
    generator = torch.Generator().manual_seed(0)
    made = scattered_pages(lengths, (48,), generator, torch.float32)
    return (torch.randn(len(lengths), queries, heads, 48, generator=generator), *made, 32, 0.3)


def heads(*lengths: int, queries: int = 2) -> tuple[tuple, dict]:
    """The same for 4 heads that share 2 key/value heads."""
    generator = torch.Generator().manual_seed(0)
    made = scattered_pages(lengths, (2 * 16, 2 * 24), generator, torch.float32)
    return (torch.randn(len(lengths), queries, 4, 16, generator=generator), *made), {"scale": 0.3}


@interpreted
@pytest.mark.parametrize("processors", [1, 3, 40])
def test_any_number_of_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    monkeypatch.setattr(split, "num_processors", lambda device: processors)
    arguments = latents(*RAGGED)
    torch.testing.assert_close(decode(*arguments), decode_reference(*arguments), rtol=1e-4, atol=1e-5)
    given, options = heads(*RAGGED)
    expected = decode_heads_reference(*given, **options)
    torch.testing.assert_close(decode_heads(*given, **options), expected, rtol=1e-4, atol=1e-5)


def test_every_tile_belongs_to_one_part_and_every_piece_has_its_own_place() -> None:
    lengths, parts, entries = (130, 0, 1, 64, 193), 4, 16
    tiles = [-(-length // entries) for length in lengths]
    share = -(-sum(tiles) // parts)
    owners = [number // share for number in range(sum(tiles))]
    sequences = [b for b, count in enumerate(tiles) for _ in range(count)]
    pieces = set(zip(owners, sequences, strict=True))
    assert len({part + b for part, b in pieces}) == len(pieces)
    assert max(part + b for part, b in pieces) < parts + len(lengths) - 1


@interpreted
def test_without_entries_there_are_zeros_and_a_log_sum_of_minus_infinity(poisoned: None) -> None:
    given, options = heads(0, 0)
    for out_BTHV, lse_BTH in (decode(*latents(0, 0)), decode_heads(*given, **options)):
        assert torch.equal(out_BTHV, torch.zeros_like(out_BTHV))
        assert torch.equal(lse_BTH, torch.full_like(lse_BTH, -math.inf))


@interpreted
def test_queries_before_the_first_entry_see_nothing() -> None:
    out_BTHV, lse_BTH = decode(*latents(2, queries=4))
    assert lse_BTH[0].isfinite().all(-1).tolist() == [False, False, True, True]
    assert torch.equal(out_BTHV[0, :2], torch.zeros_like(out_BTHV[0, :2]))


@interpreted
def test_the_last_query_sees_all_and_the_one_before_it_one_less() -> None:
    q_BTHK, pages_PSK, table_BN, lengths_B, *rest = latents(34, 65)
    both, _ = decode(q_BTHK, pages_PSK, table_BN, lengths_B, *rest)
    last, _ = decode(q_BTHK[:, 1:], pages_PSK, table_BN, lengths_B, *rest)
    before, _ = decode(q_BTHK[:, :1], pages_PSK, table_BN, lengths_B - 1, *rest)
    torch.testing.assert_close(both, torch.cat((before, last), dim=1))


@interpreted
def test_the_order_of_the_pages_changes_no_bit() -> None:
    q_BTHK, pages_PSK, table_BN, *rest = latents(*RAGGED)
    moved_P = torch.randperm(len(pages_PSK), generator=torch.Generator().manual_seed(1))
    elsewhere_PSK = torch.empty_like(pages_PSK)
    elsewhere_PSK[moved_P] = pages_PSK
    first = decode(q_BTHK, pages_PSK, table_BN, *rest)
    second = decode(q_BTHK, elsewhere_PSK, moved_P.int()[table_BN], *rest)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@interpreted
def test_a_sequence_does_not_notice_its_neighbours() -> None:
    q_BTHK, pages_PSK, table_BN, lengths_B, *rest = latents(*RAGGED)
    together, _ = decode(q_BTHK, pages_PSK, table_BN, lengths_B, *rest)
    alone, _ = decode(q_BTHK[3:], pages_PSK, table_BN[3:], lengths_B[3:], *rest)
    torch.testing.assert_close(together[3:], alone)


@interpreted
def test_pages_may_be_a_slice_of_a_larger_cache() -> None:
    q_BTHK, pages_PSK, *rest = latents(*RAGGED)
    wider_PLSX = torch.full((len(pages_PSK), 2, 64, 60), math.nan)
    wider_PLSX[:, 1, :, 5:53] = pages_PSK
    sliced = decode(q_BTHK, wider_PLSX[:, 1, :, 5:53], *rest)
    for found, expected in zip(sliced, decode(q_BTHK, pages_PSK, *rest), strict=True):
        assert torch.equal(found, expected)


def test_the_reference_is_softmax_over_what_a_query_sees() -> None:
    q_BTHK, pages_PSK, table_BN, lengths_B, width, scale = latents(130, queries=1)
    entries_SK = pages_PSK[table_BN[0].long()].flatten(0, 1)[:130]
    out_BTHV, lse_BTH = decode_reference(q_BTHK, pages_PSK, table_BN, lengths_B, width, scale)
    scores_HS = q_BTHK[0, 0] @ entries_SK.T * scale
    torch.testing.assert_close(out_BTHV[0, 0], scores_HS.softmax(-1) @ entries_SK[:, :width])
    torch.testing.assert_close(lse_BTH[0, 0], scores_HS.logsumexp(-1))


def test_the_reference_of_grouped_heads_is_torch_attention() -> None:
    given, options = heads(75, queries=3)
    q_BTHK, keys_PSX, values_PSX, table_BN, _ = given
    keys_BGSK, values_BGSV = (
        pages[table_BN[0].long()].flatten(0, 1)[None, :75].unflatten(2, (2, -1)).transpose(1, 2)
        for pages in (keys_PSX, values_PSX)
    )
    visible_TS = torch.ones(3, 75, dtype=torch.bool).tril(72)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2), keys_BGSK, values_BGSV, attn_mask=visible_TS, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(decode_heads_reference(*given, **options)[0], expected.transpose(1, 2))


@interpreted
def test_the_registrations_of_the_operations_are_sound() -> None:
    torch.library.opcheck(paged_latent._decode, (*latents(3, queries=1), True, split.NO_WINDOW))
    given, _ = heads(3, queries=1)
    torch.library.opcheck(paged_attention._decode_heads, (*given, 0.3, True, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.zeros(2)}, "int32"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, r"\(2, N\)"),
        ({"pages_PSK": torch.zeros(4, 48, 48)}, "a power of two"),
        ({"pages_PSK": torch.zeros(4, 64, 40)}, "as wide as a query"),
        ({"pages_PSK": torch.zeros(4, 64, 48).half()}, "one dtype"),
        ({"value_width": 49}, "values no wider"),
        ({"window": 0}, "None for all entries"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    names = ("q_BTHK", "pages_PSK", "block_table", "lengths", "value_width", "scale")
    with pytest.raises(KernelError, match=message):
        decode(**dict(zip(names, latents(5, 6), strict=True)) | change)


def test_groups_that_do_not_divide_the_heads_are_refused() -> None:
    (q_BTHK, *rest), options = heads(5, 6)
    with pytest.raises(KernelError, match="G a divisor of the query heads"):
        decode_heads(q_BTHK[:, :, :3], *rest, **options)


@pytest.mark.parametrize(("rows", "tile"), [(1, 16), (16, 16), (17, 64), (256, 64)])
def test_hopper_takes_the_smallest_tile_that_holds_the_rows(rows: int, tile: int) -> None:
    assert paged_latent.tile_for((9, 0), torch.bfloat16, rows).rows == tile


def on_device(run: tuple[int, int], dtype: torch.dtype) -> tuple:
    """DeepSeek's widths with `run` heads and queries, on the CUDA device."""
    count, queries = run
    generator = torch.Generator("cuda").manual_seed(0)
    made = scattered_pages((700, 0, 1, 64, 2049), (576,), generator, dtype)
    q_BTHK = torch.randn(5, queries, count, 576, generator=generator, device="cuda").to(dtype)
    return (q_BTHK, *made, 512, 576**-0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("run", [(16, 1), (16, 2), (20, 1), (64, 1), (128, 2)], ids=str)
def test_wide_latents_are_right_on_the_device(run: tuple[int, int], dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    q_BTHK, pages_PSK, *rest = on_device(run, dtype)
    found = decode(q_BTHK, pages_PSK, *rest)
    expected = decode_reference(q_BTHK.float(), pages_PSK.float(), *rest)
    assert (found[0].float() - expected[0]).norm() <= 1e-2 * expected[0].norm()
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_decode_follows_the_lengths() -> None:
    q_BTHK, pages_PSK, table_BN, lengths_B, *rest = on_device((16, 1), torch.bfloat16)
    shorter_B = (lengths_B - 3).clamp(min=0)
    given_B = lengths_B.clone()
    decode(q_BTHK, pages_PSK, table_BN, given_B, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_BTHV, _ = decode(q_BTHK, pages_PSK, table_BN, given_B, *rest)
    for now_B in (lengths_B, shorter_B):
        given_B.copy_(now_B)
        graph.replay()
        expected, _ = decode(q_BTHK, pages_PSK, table_BN, now_B, *rest)
        assert torch.equal(out_BTHV, expected)
