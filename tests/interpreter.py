"""What ops mean, carried out by plain torch hooks on a plain diffusers pipeline: ``lens.run`` is compared with it.

Written from the documentation and from the sources of diffusers. It shares nothing with the library, of which it reads
the fields of ops and of runs only: names of sites are matched, selections resolved, sources laid out and values changed
by code of its own.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tests.random_ops.places import Place, Wiring


@dataclass
class Touch:
    """What an edit did at one step: the elements [row, token, channel], and squares of their norm."""

    elements: torch.Tensor
    before: float = 0.0
    after: float = 0.0


@dataclass
class Outcome:
    """latents; reads: op -> site -> tensor; touched: (op, site, branch) -> step -> Touch; clock: (timestep, sigma)."""

    latents: torch.Tensor | None = None
    reads: dict = field(default_factory=dict)
    touched: dict = field(default_factory=lambda: defaultdict(dict))
    clock: list = field(default_factory=list)


class Calls(TorchFunctionMode):
    """Shows an interpreter each call of attention in the modules that it follows."""

    def __init__(self, interpreter):
        super().__init__()
        self.interpreter = interpreter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not scaled_dot_product_attention or self.interpreter.calling is None:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        given |= self.interpreter.turn_back(given)
        query, key, value = (given[name] for name in ("query", "key", "value"))
        result = func(**given)
        return self.interpreter.attend(query, key, value, given.get("attn_mask"), result)


class Interpreter:
    """Carries out ops on one pipeline. forwards: the branches of each transformer call of one step."""

    def __init__(self, wiring: Wiring, pipe, forwards, ops, steps: int, prompts: list | None, rows: int):
        self.wiring, self.pipe, self.forwards, self.ops, self.steps = wiring, pipe, forwards, ops, steps
        self.prompts, self.rows = prompts, rows
        self.branches = [branch for call in forwards for branch in call]
        self.sites = [self.named_once(op) for op in ops]
        self.outcome, self.pieces, self.gates = Outcome(), defaultdict(list), {}

    def named_once(self, op) -> list[str]:
        """The sites of an op. An edit acts once on a tensor that has two names, by the first of them."""
        sites = self.wiring.expand(op.site)
        if is_read(op):
            return sites
        if type(op).__name__ in ("AttentionMask", "Rope"):  # done where attention is called
            return []
        first = {}
        for site in sites:
            first.setdefault(self.wiring.places[site], site)
        return list(first.values())

    def draw(self, batches) -> Outcome:
        """batches: (arguments of the pipeline, seeds of its rows), one after the other."""
        drawn, self.first = [], 0
        for call, seeds in batches:
            self.count, self.call = len(seeds), -1
            handles = [*self.hooks(), *self.hooks_of_attention()]
            try:
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                with Calls(self):
                    drawn.append(self.pipe(**call, generator=generators, output_type="latent")[0])
            finally:
                for handle in handles:
                    handle.remove()
            self.first += self.count
        self.outcome.latents = torch.cat(drawn)
        self.put_reads_together()
        return self.outcome

    # Hooks

    def hooks(self):
        """On every module that a site or a gate of an op lies at, and on the transformer, which sets the clock."""
        model = self.pipe.transformer
        yield model.register_forward_pre_hook(self.begin, with_kwargs=True)
        self.held, self.sources = {}, {source for op in self.ops for source in sources_in_the_pass(op, self.wiring)}
        wanted = {site for sites in self.sites for site in sites} | self.sources
        places = {site: place for site, place in self.wiring.places.items() if site in wanted}
        gates = [*dict.fromkeys(place.gate for place in places.values() if place.gate is not None)]
        modules = [*((place.module, place.side) for place in places.values()), *(gate[:2] for gate in gates)]
        for path, side in dict.fromkeys(modules):
            here = {site: place for site, place in places.items() if (place.module, place.side) == (path, side)}
            visit = self.visitor(here, [gate for gate in gates if gate[:2] == (path, side)])
            module = model.get_submodule(path)
            if side == "in":
                yield module.register_forward_pre_hook(
                    lambda module, args, kwargs, visit=visit: visit(module, (args, kwargs)), with_kwargs=True
                )
            else:
                yield module.register_forward_hook(lambda module, args, output, visit=visit: visit(module, output))

    def hooks_of_attention(self):
        """On modules that call attention, and on the norms in them, where ops act inside."""
        self.calling, self.normed = None, {}
        masks = [op for op in self.ops if type(op).__name__ == "AttentionMask"]
        asked = {(int(site.split(".")[1]), op.keys) for op in masks for site in self.wiring.expand(op.site)}
        ropes = [op for op in self.ops if type(op).__name__ == "Rope"]
        asked |= {(int(site.split(".")[1]), "img") for op in ropes for site in self.wiring.expand(op.site)}
        for path in {self.wiring.attentions[one][0] for one in asked}:
            module = self.pipe.transformer.get_submodule(path)
            yield module.register_forward_pre_hook(lambda *_, path=path: self.enter(path))
            for name, norm in module.named_children():
                if name.startswith("norm_"):
                    yield norm.register_forward_hook(
                        lambda _, args, output, name=name: self.normed.__setitem__(name, output.clone())
                    )
            yield module.register_forward_hook(lambda *_: setattr(self, "calling", None))

    def enter(self, path):
        """A module that calls attention is entered, none of whose norms was called."""
        self.calling, self.normed = path, {}

    def turn_back(self, given) -> dict:
        """Queries and keys, [row, head, token, channel], without the rotation that ops take out."""
        found = {name: given[name].clone() for name in ("query", "key")}
        for number, op in enumerate(self.ops):
            if type(op).__name__ != "Rope" or self.step not in self.steps_of(op):
                continue
            for site, name in product(self.wiring.expand(op.site), found):
                _, block, stream = site.split(".")
                path, kind = self.wiring.attentions[int(block), "img"]
                for branch in self.branches_of(op, site) if path == self.calling else ():
                    if branch in self.here:
                        self.take_norm(
                            (number, op, site, branch), name, self.among(found[name].shape[2], stream, kind), found
                        )
        return found

    def take_norm(self, where, name, tokens_there, found):
        """Puts what a norm gave in the place of queries or keys."""
        (number, op, site, branch), x = where, found[name]
        added = f"norm_added_{name[0]}"
        own = added in self.normed and len(tokens_there) < x.shape[2]
        normed = self.normed[added if own and ".txt" in site else f"norm_{name[0]}"]
        normed = normed if normed.ndim == 4 else normed.unflatten(2, (x.shape[1], -1))  # [row, token, head, channel]
        first, size = self.here.index(branch) * self.count, x.shape[1] * x.shape[3]
        touch = self.outcome.touched[number, f"{site}.attn.{name[0]}_rot", branch].setdefault(
            self.step, Touch(torch.zeros(self.rows, len(tokens_there), size, dtype=torch.bool))
        )
        for numbers, rows, tokens in self.batch_groups(op, site):
            for own_row, row in zip(numbers, rows, strict=True):
                there = [tokens_there[token] for token in tokens]
                source = tokens if own else there
                touch.elements[outer([own_row], tokens, list(range(size)))] = True
                touch.before += float(x[first + row][:, there].double().square().sum())
                x[first + row][:, there] = normed[first + row, source].transpose(0, 1)
                touch.after += float(x[first + row][:, there].double().square().sum())

    def attend(self, query, key, value, mask, result):
        """What attention puts out, [row, head, query, channel], after all that ops knock out there."""
        result, cut = result.clone(), torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool)
        for number, op in enumerate(self.ops):
            if type(op).__name__ != "AttentionMask" or self.step not in self.steps_of(op):
                continue
            for site in self.wiring.expand(op.site):
                _, block, stream = site.split(".")
                path, kind = self.wiring.attentions[int(block), op.keys]
                if path == self.calling:
                    name = f"{site}.{'cross' if kind == 'cross' else 'attn'}.pattern"
                    for branch in self.branches_of(op, site):
                        if branch in self.here:
                            where = (number, op, site, name, stream, branch, kind)
                            self.knock_out(where, (query, key, value, mask), cut, result)
        return result

    def knock_out(self, where, given, cut, result):
        query, key, value, mask = given
        number, op, site, name, stream, branch, kind = where
        first, heads = self.here.index(branch) * self.count, range(query.shape[1])
        heads = list(heads) if op.heads is None else [heads[head] for head in as_list(op.heads)]
        asking, read = (self.among(one.shape[2], of, kind) for one, of in ((query, stream), (key, op.keys)))
        size = query.shape[3]
        touch = self.outcome.touched[number, name, branch].setdefault(
            self.step, Touch(torch.zeros(self.rows, len(asking), query.shape[1] * size, dtype=torch.bool))
        )
        channels = [channel for head in heads for channel in range(head * size, (head + 1) * size)]
        for numbers, rows, tokens in self.batch_groups(op, site):
            for own, place_of_row in zip(numbers, rows, strict=True):
                row, queries = first + place_of_row, [asking[token] for token in tokens]
                out = [read[token] for token in self.keys_of(op, own, branch)]
                scores = query[row].double() @ key[row].double().transpose(-1, -2) / size**0.5
                if mask is not None:
                    scores = scores + torch.zeros_like(scores).masked_fill(
                        ~mask.expand(*query.shape[:3], -1)[row], -np.inf
                    )
                cut[np.ix_([row], heads, queries, out)] = True
                scores = scores.masked_fill(cut[row], -np.inf)
                made = scores.softmax(-1).nan_to_num(0) @ value[row].double()
                place = np.ix_(heads, queries)
                touch.elements[outer([own], tokens, channels)] = True
                touch.before += float(result[row][place].double().square().sum())
                result[row, np.array(heads)[:, None], np.array(queries)] = made[place].to(result.dtype)
                touch.after += float(result[row][place].double().square().sum())

    def among(self, length, stream, kind) -> list[int]:
        """The tokens of a stream among those of attention."""
        image = int(np.prod(self.wiring.grid))
        if kind in ("own", "cross"):
            return list(range(length))
        front = stream == ("txt" if kind == "text first" else "img")
        count = image if stream == "img" else length - image
        return list(range(count)) if front else list(range(length - count, length))

    def keys_of(self, op, row, branch) -> list[int]:
        """The tokens that are no longer read in one row."""
        every = range(self.wiring.text if op.keys == "txt" else int(np.prod(self.wiring.grid)))
        if op.key_mask is not None:
            mask, width = np.array(op.key_mask), self.wiring.grid[-1]
            return [token for token in every if mask[token // width, token % width]]
        if isinstance(op.key_tokens, str):
            prompt = self.prompts[row // (self.rows // len(self.prompts))]
            return self.wiring.words(prompt, op.key_tokens) if branch == "cond" else []
        return list(every) if op.key_tokens is None else [every[token] for token in as_list(op.key_tokens)]

    def begin(self, module, args, kwargs):
        self.call += 1
        self.step, number = divmod(self.call, len(self.forwards))
        self.here, self.inputs = self.forwards[number], (args, kwargs)
        name, position = self.wiring.time
        value = kwargs[name] if name in kwargs else args[position]
        self.timestep, self.sigma = float(value.flatten()[0]), self.levels()[self.step]
        if number == 0 and self.first == 0:
            self.outcome.clock.append((self.timestep, self.sigma))

    def visitor(self, places, gates):
        """What is done at one side of a module, where a tensor may have several names."""
        named = defaultdict(list)
        for site, place in places.items():
            named[place].append(site)

        def visit(module, value):
            for gate in gates:
                self.gates[gate] = gate[2](module, value)
            for place, sites in named.items():
                value = self.at(sites, place, module, value)
            return value

        return visit

    def at(self, sites: list[str], place: Place, module, value):
        """Does what all ops want of one tensor, in the order of the ops."""
        whole = place.find(value)
        changed = place.to_tokens(whole if place.made is None else place.made(module, whole, self))
        gate = None if place.gate is None else self.gates[place.gate].expand(*changed.shape[:2], -1)
        starts = None if place.starts is None else self.inputs[1][place.starts].sum(1).tolist()
        part, edited = slice(*place.part), False
        for (number, op), site in product(enumerate(self.ops), sites):
            if site not in self.sites[number] or self.step not in self.steps_of(op):
                continue
            for branch in self.branches_of(op, site):
                if branch not in self.here:
                    continue
                first = self.here.index(branch) * self.count
                rows = range(first, first + self.count)
                spans = [place.tokens_of(row, changed.shape[1], starts) for row in rows]
                x = torch.stack([changed[row, span, part] for row, span in zip(rows, spans, strict=True)])
                factor = 1.0
                if gate is not None:
                    factor = torch.stack([gate[row, span] for row, span in zip(rows, spans, strict=True)])
                if is_read(op):
                    self.read(number, op, site, branch, x * factor)
                    continue
                edited = True
                x = self.edit(number, op, site, branch, x, factor)
                for row, span, new in zip(rows, spans, x, strict=True):
                    changed[row, span, part] = new
        for site in self.sources.intersection(sites):
            spans = [place.tokens_of(row, changed.shape[1], starts) for row in range(len(changed))]
            self.held[site] = [changed[row, span, part].clone() for row, span in enumerate(spans)]
        return place.put(value, place.from_tokens(changed, whole)) if edited else value

    def levels(self) -> list[float]:
        """The noise level of every step."""
        scheduler = self.pipe.scheduler
        if hasattr(scheduler, "sigmas"):
            return [float(sigma) for sigma in scheduler.sigmas]
        return [float((1 - scheduler.alphas_cumprod[int(time)]) ** 0.5) for time in scheduler.timesteps]

    # What an op selects

    def steps_of(self, op) -> list[int]:
        chosen, every = op.steps, range(self.steps)
        if chosen is None:
            return list(every)
        if hasattr(chosen, "high"):
            return [step for step in every if chosen.low < self.levels()[step] <= chosen.high]
        if isinstance(chosen, slice):
            return list(every[chosen])
        if isinstance(chosen, tuple) and any(isinstance(end, float) for end in chosen):
            return [step for step in every if chosen[0] <= step / self.steps < chosen[1]]
        return list(dict.fromkeys(every[step] for step in as_list(chosen)))

    def branches_of(self, op, site) -> list[str]:
        """Reads take cond, edits both, and what comes from a run the branches that the run read."""
        default = "cond" if is_read(op) else "both"
        given = source_of(op)
        there = reading_of(given, site).branches if was_read(given) else tuple(added(op, site, {}))
        if there:
            default = there[0] if len(there) == 1 else "both"
        asked = op.branch or default
        return self.branches if asked == "both" else [asked]

    def rows_of(self, op) -> list[int]:
        """Numbers over all batches, in the order of the batch."""
        every = range(self.rows)
        if type(op).__name__ == "Guide":
            return [every[op.row], every[op.twin]]
        rows = list(every) if op.rows is None else [every[row] for row in as_list(op.rows)]
        return sorted(rows) if type(op).__name__ == "Resample" else rows  # what is drawn does not depend on the order

    def groups(self, op, site) -> list[tuple[list[int], list[int]]]:
        """Rows and their tokens: one group, except where a word stands elsewhere in every prompt."""
        every, rows = range(self.wiring.tokens(site)), self.rows_of(op)
        if isinstance(op.tokens, str):
            each = self.rows // len(self.prompts)
            return [([row], self.wiring.words(self.prompts[row // each], op.tokens)) for row in rows]
        if op.mask is not None:
            mask = np.array(op.mask)
            width = self.wiring.grid[-1]
            return [(rows, [token for token in every if mask[token // width, token % width]])]
        return [(rows, list(every) if op.tokens is None else [every[token] for token in as_list(op.tokens)])]

    def channels_of(self, op, site) -> list[int]:
        every = range(self.wiring.places[site].width)
        chosen = op.channels[site] if isinstance(op.channels, dict) else op.channels
        return list(every) if chosen is None else [every[channel] for channel in as_list(chosen)]

    def batch_groups(self, op, site):
        """Groups as rows of this batch, numbered from its first, with the rows' own numbers."""
        for rows, tokens in self.groups(op, site):
            here = [row for row in rows if 0 <= row - self.first < self.count]
            if here:
                yield here, [row - self.first for row in here], tokens

    # What an op does

    def read(self, number, op, site, branch, x):
        for here, rows, tokens in self.batch_groups(op, site):
            kept = x[outer(rows, tokens, self.channels_of(op, site))].clone()
            kept = activations(op, kept) if hasattr(op, "features") else kept
            kept = kept if op.reduce is None else reduced(kept, op.reduce)
            self.pieces[number, site, self.step, branch] += zip(here, kept, strict=True)

    def edit(self, number, op, site, branch, x, gate):
        if getattr(op, "strength", 1) == 0 or (type(op).__name__ == "Feature" and (op.scale, op.add) == (1, 0)):
            return x
        touched = self.outcome.touched[number, site, branch]
        size = (self.rows, *x.shape[1:])
        touch = touched.setdefault(self.step, Touch(torch.zeros(size, dtype=torch.bool)))
        found, channels = x.clone(), self.channels_of(op, site)
        for numbers, rows, tokens in self.batch_groups(op, site):
            where = outer(rows, tokens, channels)
            old, factor = x[where], 1.0 if isinstance(gate, float) else gate[where]
            new = self.value(op, site, branch, old.clone(), (numbers, tokens, channels), x)
            found[where] = new
            touch.elements[outer(numbers, tokens, channels)] = True
            touch.before += float((old * factor).double().square().sum())
            touch.after += float((new * factor).double().square().sum())
        return found

    def value(self, op, site, branch, old, where, x):
        """What the chosen elements become."""
        kind, (rows, tokens, channels) = type(op).__name__, where
        if kind == "Zero":
            return torch.zeros_like(old)
        if kind == "Guide":
            pushed = old[:1] + op.scale * (old[:1] - old[1:]) if branch == "cond" else old[:1]
            return pushed.expand_as(old)
        if kind == "Feature":
            change = (op.scale - 1) * activations(op, old) + op.add
            return (old.float() + change @ op.dictionary.decoder[as_list(op.features)]).to(old.dtype)
        if kind == "Scale":
            return old * op.factor
        if kind == "Add":
            value = added(op, site)
            value = torch.as_tensor(value[branch] if isinstance(value, dict) else value).to(old.dtype)
            return old + (value[self.position(op, len(value))] if value.ndim == 2 else value)
        if kind == "TokenMean":
            mean = old.float().mean(1, keepdim=True).to(old.dtype)
            return mean.expand_as(old) if op.keep == "mean" else old - mean
        if kind == "Apply":
            hook = SimpleNamespace(name=site, step=self.step, timestep=self.timestep, sigma=self.sigma, branch=branch)
            new = op.fn(old.clone(), hook)
            return old if new is None else new.to(old.dtype)
        if kind == "Skip" or (kind == "Swap" and str(op.source).startswith("site:")):
            source = f"{site}.resid_pre" if kind == "Skip" else op.source.removeprefix("site:")
            first = self.here.index(branch) * self.count - self.first
            rows_there = torch.stack([self.held[source][first + row] for row in rows])
            new = rows_there[outer(range(len(rows)), tokens, channels)]
        elif kind == "Swap" and isinstance(op.source, str):
            source = range(self.rows)[int(op.source.removeprefix("row:"))]
            if isinstance(op.tokens, str):  # where the word stands there
                tokens = self.wiring.words(self.prompts[source // (self.rows // len(self.prompts))], op.tokens)
            new = x[outer([source - self.first], tokens, channels)].expand_as(old)
        else:
            new = self.given(op, site, branch, (rows, tokens, channels)).to(old.dtype).expand_as(old)
        strength = getattr(op, "strength", 1.0)
        # torch.lerp is (1 - strength) x + strength source, rounded as nothing else is.
        return new if strength == 1 else torch.lerp(old, new, strength)

    def given(self, op, site, branch, where):
        """The source's values for this step, [row, token, channel], where 1 stands for all."""
        (rows, tokens, channels), source = where, source_of(op)
        if type(op).__name__ == "Resample":
            rows = resampled(op.seed, self.rows_of(op), rows_of_source(source, site), rows)
        if was_read(source):
            return of_run(source, site, branch, (self.step, rows, tokens, channels), means=hasattr(op, "mean"))
        tensor = torch.as_tensor(source[site] if isinstance(source, dict) else source)
        if hasattr(op, "mean") and tensor.ndim == 2:
            tensor = tensor[:, None, None]
        tensor = tensor[(None,) * (4 - tensor.ndim)]
        value = tensor[self.position(op, len(tensor))]
        value = along(value, 0, rows, value.shape[0])
        value = along(value, 1, tokens, self.wiring.tokens(site))
        return along(value, 2, channels, self.wiring.places[site].width)

    def position(self, op, size: int) -> int:
        """Of one value for all steps, one for every step of the run, or one for each that is chosen, that of now."""
        return 0 if size == 1 else self.step if size == self.steps else self.steps_of(op).index(self.step)

    def put_reads_together(self):
        """[step, row, token, channel], or [step, branch, row, token, channel] with cond first; rows as named."""
        for number, op in enumerate(self.ops):
            if not is_read(op):
                continue
            both, found = op.branch == "both", {}
            for site in self.sites[number]:
                branches = ["cond", "uncond"] if both else self.branches_of(op, site)
                rows = self.rows_of(op)
                steps = [
                    torch.stack([self.put_rows_together(rows, number, site, step, branch) for branch in branches])
                    for step in self.steps_of(op)
                ]
                found[site] = torch.stack(steps) if both else torch.stack(steps)[:, 0]
            self.outcome.reads[number] = found

    def put_rows_together(self, rows, *key):
        """Rows of one read, whichever batches they came from."""
        pieces = dict(self.pieces[key])
        return torch.stack([pieces[row] for row in rows])


def is_read(op) -> bool:
    return type(op).__name__ in ("Read", "ReadFeatures")


def activations(op, x):
    """How much of the features of an op is in x, by an autoencoder of rectified units."""
    of = op.dictionary
    every = ((x.float() - of.decoder_bias) @ of.encoder + of.encoder_bias).clamp_min(0)
    return every if op.features is None else every[..., as_list(op.features)]


def as_list(chosen) -> list:
    return list(chosen) if hasattr(chosen, "__iter__") else [chosen]


def outer(rows, tokens, channels):
    return np.ix_(rows, tokens, channels)


def along(tensor, axis, chosen, full):
    """Of one axis of a source what is chosen: 1 stands for all, a full axis goes by number, another holds just that."""
    size = tensor.shape[axis]
    return tensor.index_select(axis, torch.tensor(chosen, dtype=torch.long)) if 1 < size == full else tensor


# Sources


def source_of(op):
    return getattr(op, "mean", None) if hasattr(op, "mean") else getattr(op, "source", None)


def sources_in_the_pass(op, wiring) -> list[str]:
    """The sites of the same forward pass that an op takes values from."""
    if type(op).__name__ == "Skip":
        return [f"{site}.resid_pre" for site in wiring.expand(op.site)]
    source = getattr(op, "source", None)
    return [source.removeprefix("site:")] if isinstance(source, str) and source.startswith("site:") else []


def was_read(source) -> bool:
    """Whether a source is a run, or one of its reads."""
    return hasattr(source, "readings") or hasattr(source, "total_steps")


def added(op, site, otherwise=None):
    """What is added at a site, for all branches or by branch; where it is not by branch, something else if given."""
    value = getattr(op, "value", None)
    value = value[site] if isinstance(value, dict) and site in value else value
    return value if isinstance(value, dict) or otherwise is None else otherwise


def reading_of(run, site):
    """The read that holds a site: whole tokens before reduced ones."""
    if not hasattr(run, "readings"):
        return run
    found = [reading for reading in run.readings if site in reading.tensors]
    return min(found, key=lambda reading: reading.reduce is not None)


def of_run(run, site, branch, where, *, means):
    """Values that a run has read, found by the numbers of their steps, rows, tokens and channels."""
    (step, rows, tokens, channels), reading = where, reading_of(run, site)
    value = reading.tensors[site][reading.steps.index(step)].as_subclass(torch.Tensor)
    value = value[["cond", "uncond"].index(branch)] if reading.both else value
    kept = reading.channels[site]
    channels = channels if kept is None else [kept.index(channel) for channel in channels]
    if means:
        return value.mean(0)[channels]
    rows = [0] if len(reading.rows) == 1 else [reading.rows.index(row) for row in rows]
    tokens = tokens if reading.tokens is None else [reading.tokens.index(token) for token in tokens]
    return value[outer(rows, tokens, channels)]


def rows_of_source(source, site) -> list[int]:
    """The numbers of the rows that a source has."""
    if was_read(source):
        return list(reading_of(source, site).rows)
    tensor = source[site]
    return list(range(tensor.shape[-3] if tensor.ndim > 2 else 1))


def resampled(seed, targets, available, rows) -> list[int]:
    """For every target row one of the others, by numpy's generator of that seed; where there is one, that."""
    rng = np.random.default_rng(seed)
    others = [[row for row in available if row != target or len(available) == 1] for target in targets]
    picked = {target: int(rng.choice(found)) for target, found in zip(targets, others, strict=True)}
    return [picked[row] for row in rows]


# Reductions, by their definitions


def reduced(x, text):
    """[row, token, channel] -> [row, channel, ...]."""
    x = x.double()
    name, _, rest = text.removesuffix(")").partition("(")
    numbers = [float(number) for number in rest.split(",")] if rest else []
    simple = {
        "mean": lambda: x.mean(1),
        "|mean|": lambda: x.mean(1).abs(),
        "mean|x|": lambda: x.abs().mean(1),
        "rms": lambda: x.square().mean(1).sqrt(),
        "max": lambda: x.abs().amax(1),
    }
    if name in simple:
        return simple[name]().float()
    if name == "topk":
        scores = x.mean(1).abs()
        order = scores.argsort(1, descending=True)[:, : int(numbers[0])]
        return torch.stack([scores.gather(1, order), order], -1).float()
    values = x.numpy()
    if name == "histogram":
        low, high, bins = numbers[0], numbers[1], int(numbers[2])
        counts = [[np.histogram(c.clip(low, high), bins, (low, high))[0] for c in row.T] for row in values]
        return torch.tensor(np.array(counts)).float()
    levels = [float(name[1:]) / 100] if name.startswith("p") else numbers
    found = torch.tensor(np.quantile(np.abs(values), levels, axis=1)).permute(1, 2, 0).float()
    return found if len(levels) > 1 else found[..., 0]
