"""Attention that keeps or meets less of the past, on the study base: latents and pooled blocks."""

from sabrage.attention.latent import MultiHeadLatent
from sabrage.attention.pooled import Pooled
from sabrage.attention.pools import Latents, Max, Mean, Pool, Reservoir
from sabrage.parts import Mixer
from sabrage.recipe import Recipe
from sabrage.recipes.base import variant


def _variant(name: str, summary: str, mixer: Mixer) -> Recipe:
    return variant(name, summary, mixers=(mixer,))


def _latent(kv_rank: int) -> Mixer:
    return MultiHeadLatent(heads=12, kv_rank=kv_rank, qk_norm=True, zero_init=True)


def _pooled(pool: Pool) -> Mixer:
    return Pooled(heads=12, pool=pool, qk_norm=True, zero_init=True)


latent = (
    _variant("mla", "base with latent attention: 256 + 32 floats cached for 1,536", _latent(256)),
    _variant("mla-small", "base with latent attention: 192 + 32 floats cached for 1,536", _latent(192)),
    _variant("pool-mean", "base seeing far blocks of 64 tokens as their mean", _pooled(Mean())),
    _variant("pool-max", "pool-mean with the largest of each number for the mean", _pooled(Max())),
    _variant("pool-reservoir", "pool-mean with one token drawn for the mean", _pooled(Reservoir())),
    _variant("pool-latent", "pool-mean with four learned latents for the mean", _pooled(Latents())),
)
