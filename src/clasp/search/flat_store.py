"""A flat (exhaustive) vector index on disk: a float32 matrix with metadata, in a crash-safe folder.

Input: vectors with ids and metadata. Output: the exact nearest neighbours by cosine; ties are ordered by id. Note:
writes only append (see ``manifest``). A replaced or deleted row remains until ``close``, or ``release`` where they are
many, copies the live rows into files of the next generation. One process writes at a time; any number may read the
state they opened. The matrix is memory-mapped and compared with its checksums when it is first read (see
``verified_matrix``); memory is about 300 bytes a row, and the scores of a query. A long class: reading, appending and
compacting share one view of the files.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64

from clasp.errors import counted
from clasp.plain_types import Hit, UserError
from clasp.search.manifest import (
    REBUILD_HINT,
    STORE_SUFFIXES,
    DamagedStoreError,
    Manifest,
    RowLog,
    encode_deletion,
    encode_row,
    lock_store,
    read_manifest,
    read_row_log,
    write_at,
    write_manifest,
)
from clasp.search.stored_model import StoredModel, row_norms
from clasp.search.verified_matrix import BlockChecksums, VerifiedMatrix, extend_checksums

_MetadataFilter = Callable[[Mapping[str, Any]], bool]

_ROWS_AT_ONCE = 1 << 14  # rows of the matrix in memory at once
_SCORES_AT_ONCE = 1 << 24  # scores in memory at once; at least one query's
_FEW_DEAD_ROWS, _DEAD_SHARE = 1000, 8  # ``release`` compacts when more rows, and more than one in eight, are dead


class FlatStore:
    """A folder of vectors; a ``Store``. Opening it writes nothing; a folder that does not exist is an empty store.

    ``UserError`` for a folder that is not a store, for damaged files, and for disk errors: a write that fails leaves
    the store as it was.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.expanduser(folder))
        self._release_lock: Callable[[], Any] | None = None
        self._load()

    def __repr__(self) -> str:
        return f"FlatStore({str(self.folder)!r}, {self.count()} vectors)"

    @property
    def model(self) -> str:
        """Fingerprint of the model that computed the vectors; empty if none is recorded."""
        return self._manifest.model

    @property
    def model_name(self) -> str:
        """Its name, for messages."""
        return self._manifest.name

    def claim(self, model: str, name: str) -> None:
        """Record the model of the vectors, written with the first. ``UserError`` if the stored ones are another's."""
        current = self._manifest
        if not self.count():
            self._manifest = replace(current, model=model, name=name)
        else:
            StoredModel(current.model, current.name).require_same(StoredModel(model, name), self.folder)

    def count(self) -> int:
        """Number of ids."""
        return len(self._log.row)

    def verify(self) -> None:
        """Compare with their checksums all vectors that this process has not read. Raises ``DamagedStoreError``."""
        self._vectors.all()

    def close(self) -> None:
        """Compact the files and release the write lock, if this process wrote. ``DamagedStoreError`` where the vectors
        are damaged: they are not compacted, but the lock is released."""
        self._end_write(0)

    def release(self) -> None:
        """Release the write lock, if this process wrote; the files are compacted only where many rows are dead, so that
        a small change of a large store takes the time of the change."""
        self._end_write(max(_FEW_DEAD_ROWS, self.count() // _DEAD_SHARE))

    def fork(self) -> FlatStore:
        """The store as it was read, without reading it again, to be changed while others search this object."""
        made = copy.copy(self)
        made._release_lock, made._log = None, self._log.copy()
        return made

    def _end_write(self, most_dead_rows: int) -> None:
        if self._release_lock is None:
            return
        try:
            if len(self._log.dead_rows) > most_dead_rows:
                self._compact()
        except UserError as error:
            self._delete_old_generations()
            if not isinstance(error.__cause__, OSError):  # no space to compact in: the store is complete without it
                raise
        finally:
            self._release_lock()
            self._release_lock = None

    # --- reading -----------------------------------------------------------------------------------------------------

    def scan(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every id with its metadata, in the order they were added."""
        for row in sorted(self._log.row.values()):
            yield self._log.ids[row], self._meta(row)

    def vectors(self, ids: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """The unit vectors of these ids; ``KeyError`` for an id that is not stored."""
        return self._vectors.rows([self._log.row[name] for name in ids])

    def metadata(self, ids: Sequence[str]) -> list[Mapping[str, Any]]:
        """The metadata of these ids; ``KeyError`` for an id that is not stored."""
        return [self._meta(self._log.row[name]) for name in ids]

    def search(
        self, queries: Float[np.ndarray, "q E"], k: int, where: _MetadataFilter | None = None
    ) -> list[list[Hit]]:
        """The ``k`` nearest of each query by cosine, best first; fewer if the store has fewer.

        ``where`` filters by metadata; it is called only for rows that would otherwise be hits. ``UserError`` for
        queries of another width.
        """
        assert k >= 0, f"k = {k}"
        if not self.count() or k == 0:
            return [[] for _ in queries]
        if queries.shape[1] != self._manifest.width:
            raise UserError(f"{self.folder} holds vectors {self._manifest.width} wide; the query is {queries.shape[1]}")
        exact = np.asarray(queries, np.float64)
        exact = exact / row_norms(exact, [f"query {number}" for number in range(len(exact))])[:, None]
        step = max(1, _SCORES_AT_ONCE // len(self._vectors))
        found: list[list[Hit]] = []
        for start in range(0, len(exact), step):
            part = exact[start : start + step]
            scores = part.astype(np.float32) @ self._vectors.all().T  # reads the map as it goes, copies nothing
            scores[:, self._log.dead_rows] = -np.inf
            found += [self._nearest(query, line, k, where) for query, line in zip(part, scores, strict=True)]
        return found

    def _nearest(
        self,
        query: Float64[np.ndarray, " E"],
        scores: Float32[np.ndarray, " rows"],
        k: int,
        where: _MetadataFilter | None,
    ) -> list[Hit]:
        """The hits of one query.

        The last bits of a float32 product depend on the position of a row in the matrix. So all rows within the
        rounding error of the k-th score are scored again, row by row in float64, where equal vectors score equal.
        """
        margin = 4 * len(query) * float(np.finfo(np.float32).eps)
        floor, rows = -np.inf, []
        for row in _rows_by_score(scores, 2 * k + 64):
            if not scores[row] > floor:  # dead rows have -inf
                break
            if where is None or where(self._meta(row)):
                rows.append(row)
                if len(rows) == k:
                    floor = scores[row] - margin
        cosines: list[float] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = self._vectors.rows(rows[start : start + _ROWS_AT_ONCE]).astype(np.float64)
            cosine = (some * query).sum(axis=1) / np.sqrt((some * some).sum(axis=1))
            cosines += np.clip(cosine, -1, 1).tolist()
        ids = self._log.ids
        best = sorted(range(len(rows)), key=lambda place: (-cosines[place], ids[rows[place]]))[:k]
        return [Hit(ids[rows[place]], cosines[place], self._meta(rows[place])) for place in best]

    def _meta(self, row: int) -> Mapping[str, Any]:
        try:
            return json.loads(self._lines[self._log.span(row)].tobytes())["meta"]
        except (ValueError, KeyError, TypeError, RecursionError):  # in a store of an earlier clasp, without checksums
            raise DamagedStoreError(
                f"the metadata of {self._log.ids[row]!r} in {self.folder} is damaged; {REBUILD_HINT}"
            ) from None

    # --- writing -----------------------------------------------------------------------------------------------------

    def add(self, ids: Sequence[str], vectors: Float[np.ndarray, "n E"], meta: Sequence[Mapping[str, Any]]) -> None:
        """Store vectors, normalised to unit length, under their ids; an id that is already stored is replaced.

        Atomic: all or none; on return the data is on disk. ``meta`` is plain data (JSON). ``UserError`` for vectors of
        another width, or one that is zero or not finite.
        """
        assert len(ids) == len(vectors) == len(meta), f"{len(ids)} ids, {len(vectors)} vectors, {len(meta)} metadata"
        if not ids:
            return
        values = np.asarray(vectors, np.float32)
        values = (values / row_norms(values, ids)[:, None]).astype("<f4")
        lines = [encode_row(name, about) for name, about in zip(ids, meta, strict=True)]
        self._begin_write()
        base, log = self._manifest, self._log
        old = log
        if not self.count():  # an empty store takes any width
            base = replace(base, generation=base.generation + 1, width=values.shape[1], rows=0, log_bytes=0)
            log = RowLog()
        if values.shape[1] != base.width:
            raise UserError(f"{self.folder} holds vectors {base.width} wide; these are {values.shape[1]}")
        new, end = self._append_rows(base, values, lines), base.log_bytes
        for name, line in zip(ids, lines, strict=True):
            start, end = end, end + len(line)
            log.add(name, start, end)
        self._map_files(new, log)
        if log is not old:
            self._delete_old_generations()

    def delete(self, ids: Iterable[str]) -> int:
        """Delete these ids, ignoring those that are not stored. Returns how many were deleted."""
        self._begin_write()
        known = [name for name in dict.fromkeys(ids) if name in self._log.row]
        if known:
            nothing = np.empty((0, self._manifest.width), "<f4")
            new = self._append_rows(self._manifest, nothing, [encode_deletion(name) for name in known])
            for name in known:
                self._log.drop(name)
            self._map_files(new, self._log)
        return len(known)

    def clear(self) -> None:
        """Delete all entries, and the recorded model."""
        self._begin_write()
        new = Manifest(generation=self._manifest.generation + 1)
        with self._disk_errors("empty it"):
            write_manifest(self.folder, new)
        self._map_files(new, RowLog())
        self._delete_old_generations()

    def _append_rows(self, base: Manifest, values: Float32[np.ndarray, "n E"], lines: Sequence[bytes]) -> Manifest:
        """Append to the files of ``base``; returns the new manifest."""
        size = base.log_bytes + sum(map(len, lines))
        new = replace(base, rows=base.rows + len(values), log_bytes=size)
        vectors, rows = (base.path(self.folder, kind) for kind in ("vectors", "rows"))
        ends = {vectors: 4 * base.width * base.rows, rows: base.log_bytes}
        first = not base.log_bytes
        if first or base.rows_checksum is not None:
            blocks = extend_checksums(() if first else self._block_checksums(), base.rows, values)
            new = replace(new, vectors_checksum=None, block_checksums=blocks)
        with self._disk_errors(f"write {counted(len(lines), 'entry')}"):
            try:
                write_at(vectors, ends[vectors], [values.data])
                checksum = write_at(rows, ends[rows], lines, 0 if first else base.rows_checksum or 0)
                if new.block_checksums is not None:
                    new = replace(new, rows_checksum=checksum)
                write_manifest(self.folder, new)
            except OSError:
                for path, end in ends.items():
                    if path.exists():
                        os.truncate(path, end)  # remove a partial write
                raise
        return new

    def _compact(self) -> None:
        """Copy the live rows, in their order, into files of the next generation."""
        rows, log, end = sorted(self._log.row.values()), RowLog(), 0
        spans = [self._log.span(row) for row in rows]
        for row, span in zip(rows, spans, strict=True):
            start, end = end, end + span.stop - span.start
            log.add(self._log.ids[row], start, end)
        new = replace(self._manifest, generation=self._manifest.generation + 1, rows=len(rows), log_bytes=end)
        blocks: tuple[int, ...] = ()

        def live() -> Iterator[memoryview]:
            nonlocal blocks
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                part = self._vectors.rows(rows[start : start + _ROWS_AT_ONCE])
                blocks = extend_checksums(blocks, start, part)
                yield part.data

        with self._disk_errors("compact it"):
            write_at(new.path(self.folder, "vectors"), 0, live())
            lines = write_at(new.path(self.folder, "rows"), 0, (self._lines[span].data for span in spans))
            new = replace(new, vectors_checksum=None, rows_checksum=lines, block_checksums=blocks)
            write_manifest(self.folder, new)
        self._map_files(new, log)
        self._delete_old_generations()

    def _block_checksums(self) -> tuple[int, ...]:
        """Of the blocks of the current matrix; that of an earlier clasp, which has one checksum, is read for them."""
        recorded = self._manifest.block_checksums
        return extend_checksums((), 0, self._vectors.all()) if recorded is None else recorded

    def _begin_write(self) -> None:
        """Take the write lock; reload and verify what another process has written since the store was opened."""
        if self._release_lock is None:
            with self._disk_errors("write to it"):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._release_lock = weakref.finalize(self, os.close, lock_store(self.folder))
        loaded, written = self._manifest, read_manifest(self.folder)
        if replace(loaded, model="", name="") != replace(written, model="", name=""):
            self._load()
            self.verify()
            self.claim(loaded.model, loaded.name)

    def _delete_old_generations(self) -> None:
        """Remove files of other generations; a reader that has them mapped keeps them."""
        for kind, suffix in STORE_SUFFIXES.items():
            for path in self.folder.glob(f"{kind}-*{suffix}"):
                if path != self._manifest.path(self.folder, kind):
                    path.unlink(missing_ok=True)

    @contextmanager
    def _disk_errors(self, intent: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "no space left on the disk" if full else error.strerror or str(error)
            raise UserError(f"{self.folder}: cannot {intent}: {reason}; what was in it is unchanged") from error

    # --- opening -----------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        manifest = read_manifest(self.folder)
        while True:
            try:
                self._map_files(manifest, read_row_log(self.folder, manifest))
                return
            except FileNotFoundError as error:
                newer = read_manifest(self.folder)
                if newer == manifest:  # else a writer compacted the store in between
                    raise UserError(f"{error.filename} is missing; {REBUILD_HINT}") from None
                manifest = newer

    def _map_files(self, manifest: Manifest, log: RowLog) -> None:
        """Memory-map the files of the manifest."""
        checksums = BlockChecksums(manifest.block_checksums or ())
        if manifest.vectors_checksum is not None and manifest.rows:  # of an earlier clasp
            checksums = BlockChecksums((manifest.vectors_checksum,), manifest.rows)
        vectors = VerifiedMatrix(manifest.path(self.folder, "vectors"), (manifest.rows, manifest.width), checksums)
        lines: np.ndarray = np.empty(0, np.uint8)
        if manifest.rows:
            lines = np.memmap(manifest.path(self.folder, "rows"), np.uint8, "r", shape=(manifest.log_bytes,))
        self._manifest, self._log = manifest, log
        self._vectors, self._lines = vectors, lines.view(np.ndarray)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _rows_by_score(scores: Float32[np.ndarray, " rows"], some: int) -> Iterator[int]:
    """Row numbers by descending score, sorted lazily: ``some`` of them, then sixteen times as many, and so on."""
    cut = np.float32(np.inf)
    while cut > -np.inf:
        above, place = cut, len(scores) - some
        cut = np.partition(scores, place)[place] if place > 0 else np.float32(-np.inf)
        rows = np.flatnonzero((scores >= cut) & (scores < above))
        yield from rows[np.argsort(-scores[rows], kind="stable")].tolist()
        some *= 16
