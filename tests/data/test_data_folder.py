import json

import numpy as np
import pytest

from sabrage.config import from_json, to_json
from sabrage.data.folder import ShardFolder
from sabrage.data.shards import write_shard
from sabrage.parts import DataError


def fill(folder, *, prefix="", trains=3, validations=1):
    folder.mkdir(exist_ok=True)
    for kind, count in (("train", trains), ("val", validations)):
        for index in range(count):
            tokens = np.arange(100 * index, 100 * index + 50)
            write_shard(folder / f"{prefix}{kind}_{index:06d}.bin", tokens)
    return folder


def part(folder, **fields):
    return ShardFolder(path=str(folder), block_tokens=16, **fields)


def test_training_shards_follow_one_another_and_validation_is_whole(tmp_path):
    corpus = part(fill(tmp_path)).open()
    assert corpus.train.blocks_per_epoch == 9
    assert corpus.train.rows(0, 9, 16)[:, 0].tolist() == [0, 16, 32, 100, 116, 132, 200, 216, 232]
    assert np.array_equal(corpus.validation, np.arange(50))


def test_several_validation_shards_are_one_stretch(tmp_path):
    corpus = part(fill(tmp_path, validations=2)).open()
    assert corpus.validation.tolist() == [*range(50), *range(100, 150)]


def test_num_shards_takes_the_first(tmp_path):
    corpus = part(fill(tmp_path), num_shards=2).open()
    assert [shard["file"] for shard in corpus.fingerprint["train"]] == [
        "train_000000.bin",
        "train_000001.bin",
    ]
    assert corpus.train.blocks_per_epoch == 6


def test_more_shards_than_there_are_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"3 training shards, data\.num_shards asks for 4"):
        part(fill(tmp_path), num_shards=4).open()


def test_an_opened_folder_stands_in_for_the_path(tmp_path):
    assert part("nowhere").open(fill(tmp_path)).train.blocks_per_epoch == 9


@pytest.mark.parametrize(
    ("prefix", "track", "expected"),
    [("fineweb_", "auto", "nocap"), ("", "auto", "own"), ("fineweb_", "stand-in", "stand-in")],
)
def test_the_track_follows_the_names_unless_given(tmp_path, prefix, track, expected):
    assert part(fill(tmp_path, prefix=prefix), track=track).open().track == expected


def test_one_foreign_shard_takes_the_folder_off_the_official_track(tmp_path):
    fill(tmp_path, prefix="fineweb_")
    assert part(fill(tmp_path, prefix="zz_", trains=1, validations=0)).open().track == "own"


@pytest.mark.parametrize("place", [1024, -2])
def test_the_fingerprint_is_plain_and_changes_with_the_tokens(tmp_path, place):
    source = part(fill(tmp_path))
    before = source.open().fingerprint
    assert json.loads(json.dumps(before)) == before
    path = tmp_path / "train_000001.bin"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    after = source.open().fingerprint
    assert [old == new for old, new in zip(before["train"], after["train"], strict=True)] == [
        True,
        False,
        True,
    ]


def test_only_gpt2s_vocabulary_has_gpt2s_tokenizer(tmp_path):
    fill(tmp_path)
    assert part(tmp_path).open().tokenizer.vocab_size == 50257
    assert part(tmp_path, vocab_size=300).open().tokenizer is None


def test_every_shard_is_checked_for_foreign_tokens(tmp_path):
    with pytest.raises(DataError, match=r"train_000002\.bin: token 0 is 200"):
        part(fill(tmp_path), vocab_size=200).open()


def test_a_missing_folder_names_the_commands(tmp_path):
    with pytest.raises(DataError, match="sabrage data fineweb"):
        part(tmp_path / "absent").open()


def test_it_goes_to_json_and_back(tmp_path):
    source = part(tmp_path, num_shards=2)
    assert from_json(json.loads(json.dumps(to_json(source)))) == source


def test_all_problems_are_told_at_once():
    assert ShardFolder(path="x").problems() == []
    assert len(ShardFolder(path="x", vocab_size=70000, block_tokens=0, num_shards=-1).problems()) == 3
