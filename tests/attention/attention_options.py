"""The options of multi-head attention, one by one and together, for the tests that hold for all of them."""

from sabrage.attention.rotary import Rotary

HALF = Rotary(share=0.5, max_length=512)
OPTIONS = {
    "gate": {"gate": True},
    "exclusive": {"exclusive_self": True},
    "paired": {"paired": True},
    "paired in a window": {"paired": True, "window": 24},
    "scaled": {"qk_norm": True, "scale": 0.4},
    "partial": {"rotary": HALF},
    "offset": {"rotary": HALF, "key_offset": True},
    "offset of few keys": {"rotary": HALF, "key_offset": True, "kv_heads": 2},
    "all": {
        "rotary": HALF, "key_offset": True, "paired": True, "exclusive_self": True, "gate": True,
        "kv_heads": 2, "window": 24, "scale": 0.3,
    },
}  # fmt: skip
