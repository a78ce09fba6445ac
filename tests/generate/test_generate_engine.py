"""Many requests at once: each gets the text that it would get alone, and gives its pages back."""

import pytest
import torch
from contracts import build, shrink

from sabrage.data.tokenizer import ByteTokenizer
from sabrage.generate.engine import Engine, Request
from sabrage.generate.pages import CacheFull
from sabrage.generate.sampling import Sampling
from sabrage.generate.text import Writer, narrow, stream_texts
from sabrage.recipes import find

GREEDY = Sampling(temperature=0)
PAGES = {"dense": None, "paged": 9}


@pytest.fixture(scope="module")
def model():
    return build(shrink(find("base")).model)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Sums in one order."""


def request(length, *, seed=0, max_tokens=20, **options):
    """A request whose prompt is `length` tokens drawn from the seed."""
    prompt = torch.randint(250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Request(prompt=tuple(prompt), max_tokens=max_tokens, seed=seed, **options)


def texts(engine, requests):
    """The new tokens of every request, in the order given."""
    numbers = [engine.submit(each) for each in requests]
    found = {number: [] for number in numbers}
    for event in engine.run():
        if event.token is not None:
            found[event.request].append(event.token)
    return [found[number] for number in numbers]


@torch.no_grad()
def greedy(model, prompt, count):
    """The likeliest tokens by whole forward passes."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("pages", PAGES.values(), ids=PAGES)
def test_every_request_gets_the_tokens_of_the_full_forward_pass(model, pages):
    sizes = [(3, 20), (40, 30), (1, 5), (64, 9), (17, 40)]
    requests = [request(n, seed=n, max_tokens=count, sampling=GREEDY) for n, count in sizes]
    found = texts(Engine(model, rows=2, capacity=100, num_pages=pages, chunk=13), requests)
    assert found == [greedy(model, each.prompt, each.max_tokens) for each in requests]


@pytest.mark.parametrize("pages", PAGES.values(), ids=PAGES)
def test_the_same_seed_writes_the_same_text_whatever_else_is_in_the_batch(model, pages):
    mine = request(5, seed=8, max_tokens=50, sampling=Sampling(min_p=0.01, repetition_penalty=1.2))
    others = [
        request(n, seed=n, max_tokens=3 * n, sampling=Sampling(top_p=0.1 * n, temperature=0.2 * n))
        for n in range(1, 9)
    ]
    alone = texts(Engine(model, rows=3, capacity=100, num_pages=pages), [mine])[0]
    beside = texts(Engine(model, rows=3, capacity=100, num_pages=pages), [*others, mine, *others])[8]
    assert beside == alone
    assert len(set(alone)) > 10
    other = texts(Engine(model, rows=3, capacity=100, num_pages=pages), [request(5, seed=9, max_tokens=50)])
    assert other[0] != alone


def test_neighbours_change_no_bit_of_the_logits(model):
    seen = []
    handle = model.head.register_forward_hook(lambda module, given, made: seen.append(made))
    for others in ([], [request(30, seed=1), request(9, seed=2)]):
        engine = Engine(model, rows=3, capacity=60)
        for each in [request(12), *others]:
            engine.submit(each)
        while engine.busy:
            engine.step()
    handle.remove()
    steps = [made[0] for made in seen if len(made) == 3]
    assert len(steps) == 2 * 19
    assert all(map(torch.equal, steps[:19], steps[19:]))


def test_a_prompt_is_admitted_as_soon_as_another_ends(model):
    engine = Engine(model, rows=2, capacity=60)
    long, short, late = (engine.submit(request(4, max_tokens=count)) for count in (30, 3, 3))
    order = [event.request for event in engine.run()]
    assert order[:2] == [long, short]
    assert order.index(late) == order.index(short, 4) + 1
    assert order[-1] == long


def test_what_ends_a_text_is_told_with_its_last_token(model):
    tokens = greedy(model, request(6).prompt, 12)
    end = tokens[7]
    engine = Engine(model, rows=1, capacity=60)
    engine.submit(request(6, max_tokens=12, sampling=GREEDY, end_of_text=end))
    engine.submit(request(6, max_tokens=4, sampling=GREEDY))
    events = list(engine.run())
    first, second = ([event for event in events if event.request == number] for number in (0, 1))
    assert [event.token for event in first] == [*tokens[: tokens.index(end)], None]
    assert [event.finished for event in first][-2:] == [None, "end of text"]
    assert [event.finished for event in second] == [None, None, None, "length"]


def test_a_request_waits_for_pages_and_all_of_them_come_back(model):
    # Three pages: each text takes two, so that one has to wait for the other although a row is free.
    engine = Engine(model, rows=2, capacity=128, num_pages=3)
    requests = [request(50, seed=n, max_tokens=30, sampling=GREEDY) for n in (1, 2)]
    assert texts(engine, requests) == [greedy(model, each.prompt, 30) for each in requests]
    assert len(engine.cache.allocator.free) == 3


def test_a_request_for_which_there_can_never_be_pages_is_told_so(model):
    engine = Engine(model, rows=2, capacity=128, num_pages=1)
    engine.submit(request(50, max_tokens=30))
    with pytest.raises(CacheFull, match="2 more pages were needed, 0 of 1 are held"):
        engine.step()


def test_a_kept_text_goes_on_as_if_it_had_been_one_prompt_and_shares_its_pages(model):
    engine = Engine(model, rows=2, capacity=128, num_pages=9)
    first = request(70, max_tokens=10, sampling=GREEDY, keep=True)
    (begun,) = texts(engine, [first])
    lines = [(5, 6, 7), (9,)]
    requests = [Request(prompt=line, max_tokens=8, sampling=GREEDY, after=0) for line in lines]
    numbers = [engine.submit(each) for each in requests]
    free = []
    found = {number: [] for number in numbers}
    while engine.busy:
        for event in engine.step():
            found[event.request].append(event.token)
        free.append(len(engine.cache.allocator.free))
    whole = [greedy(model, (*first.prompt, *begun, *line), 8) for line in lines]
    assert [found[number] for number in numbers] == whole
    # The kept text has two pages; those who go on share the first and copy the second.
    assert min(free) == 9 - 2 - 2
    engine.forget(0)
    assert len(engine.cache.allocator.free) == 9


def test_a_kept_text_holds_only_the_pages_that_it_fills(model):
    engine = Engine(model, rows=1, capacity=128, num_pages=2)
    number = engine.submit(request(6, max_tokens=120, keep=True))
    engine.step()
    assert engine.cache.allocator.free == []
    engine.cancel(number)
    assert len(engine.cache.allocator.free) == 1
    assert engine.kept_length(number) == 7


def test_prompt_and_text_count_as_seen(model):
    engine = Engine(model, rows=1, capacity=60)
    lazy = request(20, max_tokens=30, sampling=Sampling(temperature=0, repetition_penalty=1e6))
    (tokens,) = texts(engine, [lazy])
    assert len({*tokens, *lazy.prompt}) == 30 + len(set(lazy.prompt))


def test_a_cancelled_request_leaves_nothing_behind(model):
    engine = Engine(model, rows=1, capacity=60, num_pages=4)
    running, waiting = (engine.submit(request(6, max_tokens=30)) for _ in range(2))
    engine.step()
    engine.cancel(waiting)
    engine.cancel(running)
    assert not engine.busy
    assert len(engine.cache.allocator.free) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (request(0), "the prompt has no tokens"),
        (request(5, max_tokens=0), "max_tokens=0, allowed: 1 or more"),
        (
            request(50, max_tokens=20),
            r"allowed: 11 after a prompt of 50 tokens, since the cache's capacity=60",
        ),
        (request(5, keep=True), "a dense cache keeps no text"),
    ],
    ids=["empty", "none asked for", "too long", "kept"],
)
def test_impossible_requests_are_refused_at_once(model, given, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, rows=1, capacity=60).submit(given)


def test_only_a_kept_text_can_be_gone_on_from(model):
    engine = Engine(model, rows=1, capacity=60, num_pages=2)
    texts(engine, [request(5)])
    with pytest.raises(ValueError, match="no text of request 0 is kept"):
        engine.submit(request(3, after=0))


def test_in_bf16_matrices_and_cache_take_half_the_memory_and_the_text_stays_close(model):
    wide, narrower = model, narrow(build(model.spec), torch.bfloat16)
    engines = [Engine(each, rows=2, capacity=60) for each in (wide, narrower)]
    assert engines[1].cache.bytes() * 2 == engines[0].cache.bytes()
    seen = []
    handles = [
        each.head.register_forward_hook(lambda *given: seen.append(given[2])) for each in (wide, narrower)
    ]
    for engine in engines:
        engine.submit(request(20, max_tokens=1))
        engine.step()
    for handle in handles:
        handle.remove()
    exact, rounded = seen
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


class Script:
    """An engine that writes what it was told, a byte a token."""

    def __init__(self, text):
        self.tokens, self.cancelled = text.encode(), False

    def run(self):
        from sabrage.generate.engine import Event

        for index, token in enumerate(self.tokens):
            if self.cancelled:
                return
            yield Event(0, token, "length" if index + 1 == len(self.tokens) else None)

    def cancel(self, number):
        self.cancelled = True


@pytest.mark.parametrize(
    ("text", "stops", "expected", "finished"),
    [
        ("one two three", ["two"], "one ", "stop"),
        ("one two three", ["three!", "e2"], "one two three", "length"),
        ("aaab", ["aab"], "a", "stop"),
        ("naïve €uro", ["€"], "naïve ", "stop"),
        ("ends in sto", ["stop"], "ends in sto", "length"),
        ("first or second", ["second", "or"], "first ", "stop"),
    ],
)
def test_a_text_ends_before_its_stop_string_and_nothing_of_it_is_shown(text, stops, expected, finished):
    engine = Script(text)
    pieces = list(stream_texts(engine, {0: Writer(ByteTokenizer(), stops)}))
    assert "".join(piece for _, piece, _ in pieces) == expected
    assert pieces[-1][2] == finished
    assert engine.cancelled == (finished == "stop")
