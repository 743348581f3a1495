"""Random runs with random legal ops."""

from functools import partial
from itertools import pairwise, product
from math import prod

import numpy as np
import torch
from hypothesis import strategies as st

import dit_lens as dl
from dit_lens import (
    Add,
    Apply,
    AttentionMask,
    Feature,
    Guide,
    MeanAblate,
    Read,
    ReadFeatures,
    Resample,
    Rope,
    Scale,
    Skip,
    Swap,
    TokenMean,
    Zero,
)
from dit_lens.dictionaries import Dictionary
from tests.random_ops.scenarios import (
    FUNCTIONS,
    PROMPTS,
    SUBJECTS,
    Applied,
    Scenario,
    Subject,
    sources,
    values,
)

WORDS = ["red", "fox", "red fox", "a red"]
REDUCTIONS = ["mean", "|mean|", "mean|x|", "rms", "max", "p99.9", "p50", "quantile(0.1,0.9)", "histogram(-2,2,8)"]


@st.composite
def scenarios(draw, name: str):
    """A run of a pipeline with up to six ops, and a read of everything at the end."""
    subject = SUBJECTS[name]
    texts = name.startswith("flux")
    count = draw(st.integers(1, 3))
    prompts = [draw(st.sampled_from(PROMPTS)) for _ in range(count)] if texts else count
    each = draw(st.sampled_from([1, 1, 2])) if texts and count < 3 else 1
    rows = count * each
    seed = draw(st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=rows, max_size=rows)))
    guided = draw(st.sampled_from([False, True] if name == "flux-embedded" else [False, True, True, True]))
    scenario = Scenario(name, prompts, each, guided, draw(st.integers(2, 3)), seed)
    if count > 1 and draw(st.integers(0, 2)) == 0:
        scenario.batch = draw(st.sampled_from([1, count - 1, count - 1]))
    elif draw(st.integers(0, 6)) == 0:
        scenario.recorded = True
    focus = draw(st.sampled_from(subject.watched))
    calls: list = []
    for _ in range(draw(st.integers(1, 6))):
        scenario.ops.append(draw(ops(scenario, focus, calls).filter(lambda op: means_one_thing(scenario, op))))
    if draw(st.integers(0, 2)) == 0:
        between = Read(focus, branch=draw(branches(scenario, read=True)), name="between")
        scenario.ops.insert(draw(st.integers(0, len(scenario.ops))), between)
    if draw(st.booleans()):
        last = draw(st.sampled_from([subject.watched, subject.watched, subject.readable]))
        scenario.ops.append(Read(last, branch=draw(branches(scenario, read=True)), name="all"))
    unsaved = (Apply, Feature, ReadFeatures)
    plain = not any(isinstance(op, unsaved) or hasattr(source_of(op), "readings") for op in scenario.ops)
    scenario.way = draw(st.sampled_from(["ops", "ops", "trace", "json"] if plain else ["ops", "trace"]))
    scenario.saved, scenario.told = draw(st.integers(0, 3)) == 0, draw(st.integers(0, 3)) == 0
    return scenario


def means_one_thing(scenario: Scenario, op) -> bool:
    """Whether an edit has no values of their own for two names of one tensor, which is refused."""
    places = [scenario.subject.wiring.places[site] for site in sites_of(scenario, op)]
    own = (getattr(op, name, None) for name in ("channels", "value", "source", "mean"))
    return isinstance(op, Read) or len(set(places)) == len(places) or not any(isinstance(one, dict) for one in own)


def source_of(op):
    return getattr(op, "mean", getattr(op, "source", None))


@st.composite
def ops(draw, scenario: Scenario, focus: str, calls: list):
    """One op of any kind."""
    kinds = [Read, Read, Zero, Scale, Add, "row", "row", "tensor", "run", "site", "site"]
    kinds += ["edges"] * bool(scenario.subject.wiring.attentions)
    kinds += ["rope"] * scenario.subject.wiring.rotates + ["twins"] * bool(list_twins(scenario))
    kind = draw(st.sampled_from([*kinds, Resample, TokenMean, MeanAblate, Apply, Feature, ReadFeatures]))
    composed = {"site": site_swaps, "edges": masks_of_edges, "twins": guidances, "rope": ropes}
    composed |= {kind: partial(features, kind=kind, focus=focus) for kind in (Feature, ReadFeatures)}
    if kind in composed:
        return draw(composed[kind](scenario))
    if kind == "run" or (kind in (Resample, MeanAblate) and draw(st.booleans())):
        return draw(from_runs(scenario, Swap if kind == "run" else kind, focus))
    subject = scenario.subject
    writes = {Read: ("any", "linear", "none"), Zero: ("any", "linear"), Scale: ("any", "linear")}.get(kind, ("any",))
    allowed = [site for site, place in subject.wiring.places.items() if place.writes in writes]
    pattern = draw(patterns(subject, allowed, focus))
    sites = subject.wiring.expand(pattern)
    where = draw(selections(scenario, sites, words=kind is not Resample, same=kind is Read))
    where["branch"] = draw(branches(scenario, read=kind is Read, word=isinstance(where["tokens"], str)))
    if kind is Read:
        return draw(reads(scenario, pattern, sites, where))
    if kind == "row":
        return draw(row_swaps(scenario, pattern, where))
    if kind in ("tensor", Resample, MeanAblate):
        return draw(from_tensors(scenario, kind, pattern, sites, where))
    if kind is Scale:
        return Scale(pattern, factor=draw(st.sampled_from([0, 1, -1, 0.5, 2.0, -1.25])), **where)
    if kind is Add:
        return draw(adds(scenario, pattern, sites, where))
    if kind is TokenMean:
        return TokenMean(pattern, keep=draw(st.sampled_from(["mean", "residual"])), **where)
    if kind is Apply:
        return Apply(pattern, fn=Applied(draw(st.sampled_from(list(FUNCTIONS))), calls), **where)
    return Zero(pattern, **where)


@st.composite
def features(draw, scenario: Scenario, kind, focus: str):
    """Some features of a random autoencoder, of all channels: scaled and added, or read."""
    places = scenario.subject.wiring.places
    writes = ("any",) if kind is Feature else ("any", "linear", "none")
    allowed = [site for site, place in places.items() if place.writes in writes]
    found = scenario.subject.wiring.expand(draw(patterns(scenario.subject, allowed, focus)))
    width, seed = places[found[0]].width, draw(st.integers(0, 9))
    sites = [site for site in found if places[site].width == width]
    where = draw(selections(scenario, sites, words=True, same=kind is ReadFeatures))
    word = isinstance(where["tokens"], str)
    where["branch"] = draw(branches(scenario, read=kind is ReadFeatures, word=word))
    encoder, decoder = values(seed, (width, 12)) / width**0.5, values(seed + 1, (12, width)) / 12
    dictionary = Dictionary(encoder, values(seed, (12,)), decoder, values(seed, (width,)))
    where["channels"], chosen = None, draw(some(12, every=False))
    if kind is Feature:
        scale, add = draw(st.sampled_from([(0, 0), (1, 0), (-1, 0.0), (0, 2), (1, 0.5), (1.5, 0)]))
        given = {"scale": scale, "add": add}
        without = draw(st.sampled_from([None, *(["scale"] if scale == 1 else []), *(["add"] if add == 0 else [])]))
        given = {name: value for name, value in given.items() if name != without}
        return Feature(sites, dictionary, chosen, **given, **where)
    if word:
        where["branch"] = "cond"
    reduce = draw(st.sampled_from([None, *REDUCTIONS]))
    return ReadFeatures(sites, dictionary, chosen, name=f"read {len(scenario.ops)}", reduce=reduce, **where)


@st.composite
def adds(draw, scenario: Scenario, pattern, sites: list[str], where: dict):
    """A number or vector: for all sites or each, for all branches or each, for all steps, each chosen or every one."""
    _, total, chosen = unambiguous_sizes(scenario, where)

    def value(sites):
        sizes = {count_channels(scenario.subject, site, where["channels"]) for site in sites}
        size = draw(st.sampled_from([None, 1, *([*sizes] * 2 if len(sizes) == 1 else [])]))
        if size is None:
            return draw(st.sampled_from([0, 1, -1, 0.5, 2.0, -1.25]))
        shape = (*draw(st.sampled_from([(), (), (chosen,), (total,)])), size)
        dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16]))
        return values(draw(st.integers(0, 9)), shape, dtype)

    form = draw(st.sampled_from(["one", "one", "sites", "branches"]))
    if form == "branches":
        named = ["cond"] if isinstance(where["tokens"], str) else draw(st.sampled_from([["cond"], scenario.branches]))
        where["branch"] = draw(st.sampled_from([None, *named]))
        return Add(pattern, value={branch: value(sites) for branch in named}, **where)
    return Add(pattern, value={site: value([site]) for site in sites} if form == "sites" else value(sites), **where)


def count_channels(subject: Subject, site: str, channels) -> int:
    chosen = channels[site] if isinstance(channels, dict) else channels
    if chosen is None:
        return subject.wiring.places[site].width
    return len(chosen) if hasattr(chosen, "__len__") else 1


@st.composite
def patterns(draw, subject: Subject, allowed: list[str], focus: str):
    """One site by its name, or several by a pattern or list, all of them allowed; every second time about one site."""
    wiring = subject.wiring
    near = [site for site in subject.watched if site in allowed]
    if focus in allowed and draw(st.booleans()):
        site = focus
    else:
        site = draw(st.sampled_from(draw(st.sampled_from([near, allowed, allowed]))))
    form = draw(st.sampled_from(["name", "name", "blocks", "blocks", "list"]))
    if form == "list":
        return [site, *draw(st.lists(st.sampled_from(allowed), max_size=2))]
    if form == "name" or "blocks" not in site:
        return site
    _, block, stream, *point = site.split(".", 3)
    stack, numbers = draw(st.sampled_from([item for item in wiring.stacks.items() if int(block) in item[1]]))
    index = list(numbers).index(int(block))
    start, stop = draw(st.integers(0, index)), draw(st.integers(index + 1, len(numbers)))
    ends = draw(st.sampled_from([(start, stop), ("", stop), (start, ""), (start - len(numbers), stop)]))
    block = draw(st.sampled_from([f".{index}", f".{index - len(numbers)}", ".*", f"[{ends[0]}:{ends[1]}]"]))
    stream = draw(st.sampled_from([stream, stream, "*", "{img,txt}" if wiring.text else "img"]))
    point = f".{point[0]}" if point else draw(st.sampled_from(["", ".resid_post"]))
    pattern = f"{stack}{block}.{stream}{point}"
    return pattern if set(wiring.expand(pattern)) <= set(allowed) else site


@st.composite
def selections(draw, scenario: Scenario, sites: list[str], *, words: bool, same: bool):
    """Channels, tokens, mask, steps and rows. words: whether tokens may be a word; same: as many in every row."""
    wiring = scenario.subject.wiring
    width = min(wiring.places[site].width for site in sites)
    streams = {"txt" if ".txt" in site else "img" for site in sites}
    rows = draw(some(scenario.rows))
    tokens = mask = None
    form = draw(st.sampled_from(["all", "all", "tokens", "word" if streams == {"txt"} else "mask", "mask", "word"]))
    if any(wiring.places[site].vector for site in sites):
        form = "all"
    if form == "mask" and streams == {"img"} and wiring.knows_grid:
        mask = draw(masks(wiring.grid))
    elif form == "word" and words and streams == {"txt"} and scenario.texts is not None:
        tokens = draw(words_of(scenario, rows, same=same))
    elif form == "tokens":
        # Of two streams of unlike length both count from the end of the shorter: Read("blocks.0.{img,txt}", tokens=-1).
        known = wiring.knows_text if streams == {"txt"} else wiring.knows_grid
        tokens = draw(some(min(map(wiring.tokens, sites)), negative=known and len(streams) == 1))
    channels = draw(some(width, empty=True))
    if draw(st.integers(0, 4)) == 0:
        channels = {site: as_list(draw(some(wiring.places[site].width, every=False))) for site in [*sites, "velocity"]}
    return {"channels": channels, "tokens": tokens, "mask": mask, "steps": draw(steps_of(scenario)), "rows": rows}


def as_list(chosen) -> list:
    return list(chosen) if hasattr(chosen, "__iter__") else [chosen]


@st.composite
def some(draw, size: int, *, negative: bool = True, empty: bool = False, every: bool = True):
    """Some of so many, in any order: None for all, an integer, a list or a range; negative ones from the end."""
    form = draw(st.sampled_from([*(["all"] * 2 if every else []), "one", "list", "list", "range"]))
    if form == "all":
        return None
    numbers = st.integers(0, size - 1)
    if form == "range":
        start = draw(numbers)
        return range(start, draw(st.integers(start + 1, size)))
    found = [draw(numbers)]
    if form == "list":
        found = draw(st.lists(numbers, min_size=0 if empty else 1, max_size=min(size, 6), unique=True))
    if negative:
        found = [number - size if draw(st.integers(0, 3)) == 0 else number for number in found]
    return found[0] if form == "one" else found


@st.composite
def masks(draw, grid: tuple):
    mask = np.array(draw(st.lists(st.booleans(), min_size=grid[0] * grid[1], max_size=grid[0] * grid[1])))
    mask[draw(st.integers(0, len(mask) - 1))] = True
    mask = mask.reshape(grid)
    return draw(st.sampled_from([mask, torch.from_numpy(mask), mask.tolist(), mask.astype(int)]))


@st.composite
def words_of(draw, scenario: Scenario, rows, *, same: bool):
    """A word that is in the prompt of every row. same: as often in all."""
    chosen = range(scenario.rows) if rows is None else [range(scenario.rows)[row] for row in as_list(rows)]
    texts = [scenario.texts[row // scenario.each] for row in chosen]
    found = {word: [scenario.subject.wiring.words(text, word) for text in texts] for word in WORDS}
    fit = [
        word for word, where in found.items() if all(where) and (not same or len({len(here) for here in where}) == 1)
    ]
    return draw(st.sampled_from(fit)) if fit else None


@st.composite
def steps_of(draw, scenario: Scenario):
    total = scenario.steps
    form = draw(st.sampled_from(["all", "all", "some", "slice", "fractions", "sigma"]))
    first = draw(st.integers(0, total - 1))
    last = draw(st.integers(first, total - 1))
    if form == "some":
        return draw(some(total))
    if form == "slice":
        return draw(
            st.sampled_from([slice(first, last + 1), slice(first, None), slice(None, None, 2), slice(-1, None)])
        )
    if form == "fractions":
        start = draw(st.sampled_from([first / total, max(0.0, (first - 0.5) / total)]))
        return (start, draw(st.sampled_from([(last + 0.5) / total, (last + 1) / total])))
    if form == "sigma":
        levels = [1.5, *scenario.subject.levels(total), 0.0]
        between = [(level + following) / 2 for level, following in pairwise(levels)]
        return dl.sigma(1.0 if first == 0 else between[first], between[last + 1])
    return None


@st.composite
def branches(draw, scenario: Scenario, *, read: bool, word: bool = False):
    """A word is looked for in the positive prompt alone, so that it is not edited in the negative one: tokens="red"
    with a negative prompt would write to the same positions of that.
    """
    if word and not read:
        return "cond"
    both = [] if read and len(scenario.branches) == 1 else ["both"]
    return draw(st.sampled_from([None, None, *scenario.branches, *both]))


@st.composite
def reads(draw, scenario: Scenario, pattern, sites: list[str], where: dict):
    if isinstance(where["tokens"], str):
        where["branch"] = "cond"
    fewest = min(count_channels(scenario.subject, site, where["channels"]) for site in sites)
    reduce = None
    if fewest and draw(st.booleans()):
        reduce = draw(st.sampled_from([*REDUCTIONS, f"topk({draw(st.integers(1, fewest))})"]))
    taken = {site for op in scenario.ops if isinstance(op, Read) and op.name is None for site in sites_of(scenario, op)}
    name = f"read {len(scenario.ops)}" if taken & set(sites) or draw(st.booleans()) else None
    return Read(pattern, reduce=reduce, name=name, **where)


def sites_of(scenario: Scenario, op) -> list[str]:
    return scenario.subject.wiring.expand(op.site)


STRENGTHS = st.one_of(st.sampled_from([1, 1.0, 1.0, 0, 0.5, 0.25]), st.floats(0.01, 0.99))


@st.composite
def row_swaps(draw, scenario: Scenario, pattern, where: dict):
    """Rows that exchange values are in one batch."""
    source = draw(st.integers(0, scenario.rows - 1))
    if scenario.batch is not None:
        size = scenario.batch * scenario.each
        first = source - source % size
        where["rows"] = [first + draw(st.integers(0, min(size, scenario.rows - first) - 1))]
        if isinstance(where["tokens"], str):
            where["tokens"] = None
    if isinstance(where["tokens"], str):  # as often in the source as in each row
        rows = range(scenario.rows) if where["rows"] is None else as_list(where["rows"])
        chosen = [scenario.texts[range(scenario.rows)[row] // scenario.each] for row in [source, *rows]]
        if len({len(scenario.subject.wiring.words(text, where["tokens"])) for text in chosen}) > 1:
            where["tokens"] = None
    shown = draw(st.sampled_from([source, source - scenario.rows]))
    return Swap(pattern, source=f"row:{shown}", strength=draw(STRENGTHS), **where)


@st.composite
def site_swaps(draw, scenario: Scenario):
    """Values of another site of the same stream and width, which is computed before; or what enters the block."""
    places = scenario.subject.wiring.places
    whole = {
        site: place
        for site, place in places.items()
        if site.startswith("blocks.") and not place.vector and place.gate is None and place.made is None
    }
    written = [site for site, place in whole.items() if place.writes == "any"]
    pairs = [
        (source, target)
        for target in written
        for source in list(whole)[: list(whole).index(target)]
        if source.split(".")[2] == target.split(".")[2]
        and whole[source].width == whole[target].width
        and whole[source] != whole[target]  # two names of one tensor
    ]
    source, target = draw(st.sampled_from(pairs))
    skips = draw(st.booleans())
    if skips:
        target = draw(st.sampled_from([site for site in written if f"{site}.resid_pre" in whole]))
    where = draw(selections(scenario, [target], words=True, same=False))
    where["branch"] = draw(branches(scenario, read=False, word=isinstance(where["tokens"], str)))
    if skips:
        return Skip(target, **where)
    return Swap(target, source=f"site:{source}", strength=draw(STRENGTHS), **where)


def list_twins(scenario: Scenario) -> list[tuple[int, int]]:
    """Rows of one prompt and seed that are drawn together."""
    size = (scenario.batch or scenario.count) * scenario.each
    texts = scenario.texts or range(scenario.count)
    same = [(texts[row // scenario.each], scenario.seeds[row], row // size) for row in range(scenario.rows)]
    pairs = product(range(scenario.rows), repeat=2)
    return [(row, twin) for row, twin in pairs if row != twin and same[row] == same[twin]]


@st.composite
def guidances(draw, scenario: Scenario):
    row, twin = draw(st.sampled_from(list_twins(scenario)))
    shown = draw(st.sampled_from([twin, twin - scenario.rows]))
    return Guide(row=row, twin=shown, scale=draw(st.sampled_from([0, 1, 0.5, 2.0, -1.5])))


@st.composite
def ropes(draw, scenario: Scenario):
    """Rotation taken out of a block."""
    wiring = scenario.subject.wiring
    blocks = [block for block, keys in wiring.attentions if keys == "img"]
    sites = [f"blocks.{block}.{stream}" for block in blocks for stream in ("img", "txt")]
    site = draw(st.sampled_from([site for site in sites if site in wiring.places]))
    where = draw(selections(scenario, [site], words=True, same=False))
    where["branch"] = draw(branches(scenario, read=False, word=isinstance(where["tokens"], str)))
    return Rope(site, **{**where, "channels": None})


@st.composite
def masks_of_edges(draw, scenario: Scenario):
    """Edges of attention from tokens of one stream to some of one."""
    wiring = scenario.subject.wiring
    keys = draw(st.sampled_from(["img", "txt"]))
    blocks = [block for block, of in wiring.attentions if of == keys]
    sites = [f"blocks.{block}.{stream}" for block in blocks for stream in ("img", "txt")]
    site = draw(st.sampled_from([site for site in sites if site in wiring.places]))
    where = draw(selections(scenario, [site], words=True, same=False))
    where["branch"] = draw(branches(scenario, read=False, word=isinstance(where["tokens"], str)))
    where["channels"] = None
    form = draw(st.sampled_from(["all", "tokens", "tokens", "mask" if keys == "img" and wiring.knows_grid else "word"]))
    known = wiring.knows_text if keys == "txt" else wiring.knows_grid
    size = wiring.text if keys == "txt" else prod(wiring.grid)
    chosen = draw(some(size, negative=known, every=False)) if form == "tokens" else None
    if form == "word" and keys == "txt" and scenario.texts is not None:
        chosen, where["branch"] = draw(words_of(scenario, where["rows"], same=False)), "cond"
    mask = draw(masks(wiring.grid)) if form == "mask" else None
    heads = draw(some(2))
    return AttentionMask(site, keys=keys, key_tokens=chosen, key_mask=mask, heads=heads, **where)


@st.composite
def from_tensors(draw, scenario: Scenario, kind, pattern, sites: list[str], where: dict):
    """Values of given tensors, one for all sites or one each; axes of size 1 or left out stand for all.

    A tensor of no channel fails in the run, and is not made here.
    """
    wiring = scenario.subject.wiring
    if where["channels"] == []:
        where["channels"] = None
    rows, total, steps = unambiguous_sizes(scenario, where)

    def channel_axis(site):
        full, count = wiring.places[site].width, count_channels(scenario.subject, site, where["channels"])
        return {1, count, full}

    def token_axis(site):
        stream_known = wiring.knows_text if ".txt" in site else wiring.knows_grid
        full = wiring.tokens(site)
        if where["mask"] is not None:
            return {1, full, int(np.array(where["mask"]).sum())}
        if where["tokens"] is None:
            return {1, full}
        if isinstance(where["tokens"], str):
            return {1}
        tokens = [token % full for token in as_list(where["tokens"])]
        sizes = {1, len(tokens), *({full} if stream_known else {})}
        if tokens != sorted(tokens) and sorted(tokens) == list(range(len(tokens))):
            sizes -= {len(tokens)} if len(tokens) == full or not stream_known else set()
        return sizes | {1}

    def tensor(sites):
        channel = draw(st.sampled_from(sorted(set.intersection(*map(channel_axis, sites)))))
        if kind is MeanAblate:
            leading = draw(st.sampled_from([(), (), (1,), (steps,), (total,)]))
            return values(draw(st.integers(0, 9)), (*leading, channel))
        token = draw(st.sampled_from(sorted(set.intersection(*map(token_axis, sites)))))
        shape = (draw(st.sampled_from([1, steps, total])), draw(st.sampled_from([1, rows])), token, channel)
        left_out = draw(st.integers(0, next((i for i, size in enumerate(shape[:3]) if size > 1), 3)))
        dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16]))
        return values(draw(st.integers(0, 9)), shape[left_out:], dtype)

    mapping = {site: tensor([site]) for site in sites}
    if kind is MeanAblate:
        return MeanAblate(pattern, mean=mapping, **where)
    if kind is Resample:
        return Resample(pattern, source=mapping, seed=draw(st.integers(0, 9)), **where)
    source = mapping if draw(st.booleans()) else tensor(sites)
    return Swap(pattern, source=source, strength=draw(STRENGTHS), **where)


def unambiguous_sizes(scenario: Scenario, where: dict) -> tuple[int, int, int]:
    """How many rows and steps there are, and how many steps are chosen, of which there may be a value for each.

    1 where all are chosen in another order than theirs, so that a value for each could be meant in either.
    """
    rows, total = scenario.rows, scenario.steps
    steps = select_steps(scenario, where["steps"])
    named = [] if where["rows"] is None else [range(rows)[row] for row in as_list(where["rows"])]
    if named != sorted(named) and len(named) == rows:
        rows = 1
    return (rows, 1, 1) if steps != sorted(steps) and len(steps) == total else (rows, total, len(steps))


def select_steps(scenario: Scenario, steps) -> list[int]:
    """The steps that were chosen."""
    total, levels = scenario.steps, scenario.subject.levels(scenario.steps)
    every = range(total)
    if steps is None:
        return list(every)
    if isinstance(steps, slice):
        return list(every[steps])
    if isinstance(steps, tuple):
        return [step for step in every if steps[0] <= step / total < steps[1]]
    if hasattr(steps, "high"):
        return [step for step in every if steps.low < levels[step] <= steps.high]
    return list(dict.fromkeys(every[step] for step in as_list(steps)))


@st.composite
def from_runs(draw, scenario: Scenario, kind, focus: str):
    """Values of a run, as far as it has read them."""
    wiring = scenario.subject.wiring
    runs = [run for run in sources(scenario.name, scenario.steps) if fits(scenario, run, kind)]
    run = draw(st.sampled_from(runs))
    reading = run.readings[0]
    pattern = draw(patterns(scenario.subject, scenario.subject.editable, focus))
    sites = wiring.expand(pattern)
    where = draw(selections(scenario, sites, words=False, same=False))
    kept = reading.channels[sites[0]]
    if kept is not None:
        where["channels"] = draw(st.lists(st.sampled_from(kept), min_size=1, unique=True))
    if reading.tokens is not None:
        where["tokens"], where["mask"] = draw(st.lists(st.sampled_from(reading.tokens), min_size=1, unique=True)), None
    if len(reading.steps) < scenario.steps:
        where["steps"] = draw(st.lists(st.sampled_from(reading.steps), min_size=1, unique=True))
    if where["channels"] == []:
        where["channels"] = None
    if len(reading.rows) > 1 and kind is not MeanAblate:
        there = [row for row in reading.rows if row < scenario.rows]
        if kind is Swap and len(there) < scenario.rows:
            where["rows"] = draw(st.lists(st.sampled_from(there), min_size=1, unique=True))
    here = [branch for branch in reading.branches if branch in scenario.branches]
    both = ["both"] if set(scenario.branches) <= set(reading.branches) else []
    where["branch"] = draw(st.sampled_from([None, *here, *both]))
    source = draw(st.sampled_from([run, reading]))
    if kind is MeanAblate:
        return MeanAblate(pattern, mean=source, **where)
    if kind is Resample:
        return Resample(pattern, source=source, seed=draw(st.integers(0, 9)), **where)
    return Swap(pattern, source=source, strength=draw(STRENGTHS), **where)


def fits(scenario: Scenario, run: dl.Run, kind) -> bool:
    """Whether a run has what a kind of op needs, in a branch that there is and some row."""
    reading = run.readings[0]
    if (reading.reduce == "mean") != (kind is MeanAblate):
        return False
    if not set(reading.branches) & set(scenario.branches):
        return False
    return kind is not Swap or len(reading.rows) == 1 or min(reading.rows) < scenario.rows
