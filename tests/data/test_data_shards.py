import numpy as np
import pytest

from sabrage.data.shards import HEADER_BYTES, ShardWriter, find_shards, open_shard, read_header, write_shard
from sabrage.parts import DataError


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_shard(path, np.arange(1000))
    return path


def test_what_is_written_is_read_back(shard):
    tokens = open_shard(shard, vocab_size=1000)
    assert tokens.dtype == np.uint16
    assert np.array_equal(tokens, np.arange(1000))


def test_the_file_is_256_int32_words_and_then_uint16_tokens(shard):
    data = shard.read_bytes()
    header = np.frombuffer(data[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 1000]
    assert not header[3:].any()
    assert np.array_equal(np.frombuffer(data[1024:], "<u2"), np.arange(1000))


def test_pieces_make_the_same_file_as_the_whole(shard, tmp_path):
    with ShardWriter(tmp_path / "pieces.bin") as writer:
        for piece in np.split(np.arange(1000), [1, 7, 7, 500]):
            writer.write(piece)
    assert (tmp_path / "pieces.bin").read_bytes() == shard.read_bytes()


def test_the_file_has_no_name_before_it_is_whole(tmp_path):
    with ShardWriter(tmp_path / "train.bin") as writer:
        writer.write(np.arange(10))
        assert not list(tmp_path.glob("*.bin"))
    assert list(tmp_path.iterdir()) == [tmp_path / "train.bin"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path / "train.bin") as writer:
            writer.write(np.arange(10))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [[65536], [-1]])
def test_a_token_beyond_uint16_is_refused(tmp_path, tokens):
    writer = ShardWriter(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="0 to 65535"), writer:
        writer.write(np.array(tokens))


def test_a_shard_without_tokens_is_not_written(tmp_path):
    with pytest.raises(DataError, match="without tokens"):
        write_shard(tmp_path / "train.bin", np.array([], dtype=np.uint16))
    assert not list(tmp_path.iterdir())


def damage(path, *, word=None, value=0, size=None):
    data = bytearray(path.read_bytes())
    if word is not None:
        data[4 * word : 4 * word + 4] = np.array([value], "<i4").tobytes()
    path.write_bytes(bytes(data[:size]) if size is None or size <= len(data) else bytes(data) + bytes(2))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"word": 0, "value": 7}, "not a token shard"),
        ({"word": 1, "value": 2}, "version 2"),
        ({"size": HEADER_BYTES + 1998}, "truncated"),
        ({"size": HEADER_BYTES + 2002}, "too long"),
        ({"size": 0}, "0 bytes"),
        ({"size": 100}, "100 bytes"),
        ({"word": 2, "value": 0, "size": HEADER_BYTES}, "holds 0 tokens"),
        ({"word": 2, "value": -4}, "holds -4 tokens"),
    ],
)
def test_a_damaged_shard_is_named_with_its_fault(shard, fault, message):
    damage(shard, **fault)
    with pytest.raises(DataError, match=message) as caught:
        read_header(shard)
    assert str(shard) in str(caught.value)


def test_a_token_beyond_the_vocabulary_is_named_with_its_place(shard):
    with pytest.raises(DataError, match=r"train_000000.bin: token 900 is 900, allowed: 0 to 899"):
        open_shard(shard, vocab_size=900)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.bin: no such file"):
        read_header(tmp_path / "absent.bin")


def test_a_missing_folder_names_the_commands_that_make_one(tmp_path):
    with pytest.raises(DataError, match=r"sabrage data fineweb(.|\n)*sabrage data text"):
        find_shards(tmp_path / "absent")


@pytest.mark.parametrize(("present", "missing"), [("train", "validation"), ("val", "training")])
def test_a_folder_without_one_of_the_splits_says_which(tmp_path, present, missing):
    write_shard(tmp_path / f"{present}_000000.bin", np.arange(10))
    with pytest.raises(DataError, match=f"no {missing} shard"):
        find_shards(tmp_path)


def test_shards_come_sorted_by_name(tmp_path):
    for name in ("x_train_2.bin", "x_train_1.bin", "val_1.bin", "val_0.bin"):
        write_shard(tmp_path / name, np.arange(10))
    trains, validations = find_shards(tmp_path)
    assert [path.name for path in trains] == ["x_train_1.bin", "x_train_2.bin"]
    assert [path.name for path in validations] == ["val_0.bin", "val_1.bin"]
