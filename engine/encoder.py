"""The encode stage: pictures to rows of the language model, ahead of prefill and with a budget of its own.

The vision tower's features are cached by what the picture is (its digest) whatever its budget, so one picture is
encoded once for all requests of a tenant and all budgets, and again only for a method that reads a signal not tapped
before; the reduction, cheap beside it, runs per request. The key also covers the tenant's salt, within one step too, so
that neither hits nor times tell a tenant what another one has sent; and what a request cuts out of the tower itself.
"""

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from foveate.engine.common import CAPTION, OF_REQUEST, PIXELS, QUESTION, ImageError, Signal
from foveate.engine.models.base import Model
from foveate.engine.request import Picture, Request
from foveate.engine.vision import TokenTransform, VisualInputs

Wanted = tuple[Request, int]  # a request and the index of its picture
Failure = tuple[Request, Exception]


@dataclasses.dataclass(frozen=True, slots=True)
class Features:
    """One encoded picture and the signals tapped with it."""

    inputs: VisualInputs
    signals: frozenset[Signal]

    @property
    def n_bytes(self) -> int:
        fields = (getattr(self.inputs, field.name) for field in dataclasses.fields(self.inputs))
        tensors = [t for t in fields if isinstance(t, Tensor)]
        tensors += [*self.inputs.taps.values(), *self.inputs.added.values()]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())  # `enc` and `cells` may be one


class FeatureCache:
    """Features by picture key; evicts the least recently used. A reader keeps its own reference to an entry."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._entries: OrderedDict[bytes, Features] = OrderedDict()
        self._held = 0

    @property
    def n_bytes(self) -> int:
        return self._held

    def get(self, key: bytes, signals: frozenset[Signal]) -> Features | None:
        """Return the entry if it has at least these signals. Counts as a use."""
        entry = self._entries.get(key)
        if entry is None or not signals <= entry.signals:
            return None
        self._entries.move_to_end(key)
        return entry

    def signals(self, key: bytes) -> frozenset[Signal]:
        """Signals of the entry; empty if there is no entry. Does not count as a use."""
        entry = self._entries.get(key)
        return frozenset() if entry is None else entry.signals

    def put(self, key: bytes, features: Features) -> None:
        """Store or replace an entry. Does not store an entry larger than the cache."""
        self._drop(key)
        if features.n_bytes > self._capacity:
            return
        while self._held + features.n_bytes > self._capacity:
            self._drop(next(iter(self._entries)))
        self._entries[key] = features
        self._held += features.n_bytes

    def _drop(self, key: bytes) -> None:
        if key in self._entries:
            self._held -= self._entries.pop(key).n_bytes

    def check(self) -> None:
        assert self._held == sum(e.n_bytes for e in self._entries.values()), "bytes held are the entries' bytes"
        assert self._held <= self._capacity, "the cache stays within its capacity"


class Encoder:
    """Runs the vision tower and the reducers."""

    def __init__(self, model: Model, capacity_bytes: int) -> None:
        self._model = model
        self.cache = FeatureCache(capacity_bytes)
        self.n_encoded = 0  # pictures that the tower encoded
        self.n_hits = 0  # pictures that needed no run of the tower

    def cost(self, request: Request, i: int) -> int:
        """Patches the tower must read for picture `i` now."""
        picture = request.pictures[i]
        return 0 if self.cache.get(picture.key, self._needed(request, i)) else picture.n_read

    @torch.inference_mode()
    def run(self, wanted: Sequence[Wanted]) -> list[Failure]:
        """Encode and reduce pictures into their `rows`, each distinct one encoded at most once.

        Returns:
            the requests whose picture or reducer failed, and why; the others are done.
        """
        if not wanted:
            return []
        start = time.monotonic()
        features, errors = self._encode(wanted)
        elapsed = time.monotonic() - start
        for request in {id(r): r for r, _ in wanted}.values():
            request.encode_s += elapsed
        failures: list[Failure] = []
        for request, i in wanted:
            key, began = request.pictures[i].key, time.monotonic()
            try:
                found = self._encode_for(request, i, wanted, errors[key]) if key in errors else features[key]
                self._reduce(request, i, found.inputs)
            except Exception as error:
                failures.append((request, error))
            request.reduce_s += time.monotonic() - began
        return failures

    def _signals(self, request: Request) -> frozenset[Signal]:
        """Signals that the tower records for a request, also for whole pictures: a later request may need them."""
        return frozenset(signal for signal in request.signals if signal.kind not in OF_REQUEST)

    def _needed(self, request: Request, i: int) -> frozenset[Signal]:
        """Signals that picture `i` needs: none if the picture is kept whole."""
        return frozenset() if request.pictures[i].is_whole else self._signals(request)

    def _encode(self, wanted: Iterable[Wanted]) -> tuple[dict[bytes, Features], dict[bytes, Exception]]:
        """Features of all pictures by key, and errors of pictures without features."""
        pictures: dict[bytes, Picture] = {}
        needs: dict[bytes, frozenset[Signal]] = {}
        signals: dict[bytes, frozenset[Signal]] = {}
        first: dict[bytes, Request] = {}
        for request, i in wanted:
            picture = request.pictures[i]
            pictures[picture.key] = picture
            needs[picture.key] = needs.get(picture.key, frozenset()) | self._needed(request, i)
            signals[picture.key] = signals.get(picture.key, frozenset()) | self._signals(request)
            first.setdefault(picture.key, request)

        features: dict[bytes, Features] = {}
        for key, needed in needs.items():
            if entry := self.cache.get(key, needed):
                features[key] = entry
        missing = [key for key in pictures if key not in features]
        self._count_hits(wanted, missing, first)
        errors: dict[bytes, Exception] = {}
        if not missing:
            return features, errors

        # With what an entry has already, or two methods would take turns in replacing it.
        taps = {key: signals[key] | self.cache.signals(key) for key in missing}
        for key, result in self._encode_missing([pictures[key] for key in missing], taps).items():
            if isinstance(result, Exception):
                errors[key] = result
            else:
                features[key] = result
                self.cache.put(key, result)
        return features, errors

    def _count_hits(self, wanted: Iterable[Wanted], missing: list[bytes], first: dict[bytes, Request]) -> None:
        """Count hits: pictures that are cached, or that the tower just encoded for another request."""
        for request, i in wanted:
            key = request.pictures[i].key
            if not request.is_reduced(i) and (key not in missing or first[key] is not request):
                request.encoder_hits += 1
                self.n_hits += 1

    def _encode_missing(
        self, pictures: Sequence[Picture], signals: Mapping[bytes, frozenset[Signal]]
    ) -> dict[bytes, Features | Exception]:
        """Run the tower on one packed batch of whole pictures, and alone on each cut picture.

        If the batch raises, run its halves, so that neither a picture nor the signals of its methods fail others.

        Args:
            signals: to record of each picture, by key.
        """
        whole = [picture for picture in pictures if picture.cut is None]
        batches = [[picture] for picture in pictures if picture.cut is not None]
        results: dict[bytes, Features | Exception] = {}
        for batch in [whole, *batches] if whole else batches:
            try:
                results |= self._encode_batch(batch, frozenset[Signal]().union(*(signals[p.key] for p in batch)))
                continue
            except Exception as error:
                if len(batch) == 1:  # the error becomes the `Failed` of the requests it concerns, and is logged there
                    results[batch[0].key] = error
                    continue
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                results |= self._encode_missing(half, signals)
        return results

    def _encode_batch(self, batch: Sequence[Picture], signals: frozenset[Signal]) -> dict[bytes, Features | Exception]:
        """Encode whole pictures, or a single cut picture."""
        pixels = [picture.pixels(self._model.device) for picture in batch]
        if (cut := batch[0].cut) is not None:
            outputs = [self._model.encode_cut(pixels[0], signals, cut)]
        else:
            outputs = self._model.encode(pixels, signals, [picture.image.original for picture in batch])
        results = {picture.key: _features(picture, own, signals) for picture, own in zip(batch, outputs, strict=True)}
        self.n_encoded += len(batch)
        return results

    def _encode_for(self, request: Request, i: int, wanted: Sequence[Wanted], error: Exception) -> Features:
        """Features of a picture that the tower refused for all requests together, with the signals of one alone.

        Raises:
            Exception: the tower refuses the picture for this request too.
        """
        key, own = request.pictures[i].key, self._signals(request)
        if all(self._signals(other) == own for other, j in wanted if other.pictures[j].key == key):
            raise error
        features, errors = self._encode([(request, i)])
        if key in errors:
            raise errors[key]
        return features[key]

    def _reduce(self, request: Request, i: int, inputs: VisualInputs) -> None:
        picture = request.pictures[i]
        if picture.is_whole:
            rows = {0: inputs.unreduced(picture.grid)} | inputs.unreduced_added(picture.grid)
            request.place(i, rows, torch.arange(picture.n_kept))
            return
        inputs = self._with_request(inputs, request, i)
        transform = TokenTransform.identity(inputs.n)
        if picture.after is not None:
            transform = picture.after.reduce(inputs, picture.budget, request.split)
        rows = {0: transform.apply_to(inputs.proj, inputs.enc, inputs.project)}
        rows |= {layer: transform.carry(added) for layer, added in inputs.added.items()}
        if not all(torch.isfinite(own).all() for own in rows.values()):
            raise ImageError("the picture's reduced features are not finite; choose another vlm.visual.method")
        cells = transform.anchor if inputs.places is None else inputs.places[transform.anchor]
        request.place(i, rows, torch.tensor(picture.grid.tokens())[cells])

    def _with_request(self, inputs: VisualInputs, request: Request, i: int) -> VisualInputs:
        """The picture's features, with the request's inputs for the reducer."""
        picture, wanted = request.pictures[i], request.signals
        return dataclasses.replace(
            inputs,
            question=self._embed(request.question_ids, inputs) if QUESTION in wanted else None,
            caption=self._embed(picture.image.caption_ids, inputs) if CAPTION in wanted else None,
            pixels=picture.pixels(self._model.device) if PIXELS in wanted else None,
        )

    def _embed(self, ids: Sequence[int], inputs: VisualInputs) -> Tensor:
        if not ids:
            return inputs.proj.new_zeros(0, inputs.proj.shape[1])
        return self._model.embed(torch.tensor(ids, device=self._model.device))


def _features(picture: Picture, output: VisualInputs, signals: frozenset[Signal]) -> Features | Exception:
    """The features of one picture, or what is wrong with them."""
    if not all(torch.isfinite(rows).all() for rows in (output.proj, *output.added.values())):
        return ImageError("the picture's features are not finite; send another picture")
    seed = int.from_bytes(picture.image.digest[:8]) & (2**63 - 1)  # torch generators take 63 bits
    return Features(dataclasses.replace(output, seed=seed), signals)
