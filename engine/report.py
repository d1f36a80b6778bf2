"""What the engine says of one choice or request at its end."""

import logging
import time

from foveate.engine.common import Failed, RequestError, Usage
from foveate.engine.sequence import Sequence

log = logging.getLogger(__name__)


def usage(sequence: Sequence) -> Usage:
    """Queue, prefill and decode add up to the choice's life; `encode_s`, the tower's batches with its pictures in
    them, and `reduce_s`, their reduction, lie within the first two."""
    now, request = time.monotonic(), sequence.request
    admitted = sequence.admitted or now
    answered = sequence.answered or now
    return Usage(
        cached_tokens=sequence.cached_tokens,
        output_tokens=sequence.n_output,
        encoder_hits=request.encoder_hits,
        preemptions=sequence.n_preemptions,
        queue_s=admitted - request.arrived,
        encode_s=request.encode_s,
        reduce_s=request.reduce_s,
        prefill_s=answered - admitted,
        decode_s=now - answered,
        peak_kv_tokens=sequence.peak_kv_tokens,
        kept=[picture.anchors.tolist() for picture in request.pictures] if request.explains else [],
    )


def failed(request_id: str, error: Exception) -> Failed:
    """A request's own mistake says so; anything else is ours, and logged in full."""
    if isinstance(error, RequestError):
        return Failed(id=request_id, code=error.code, message=str(error), param=error.param)
    log.error("request %s failed", request_id, exc_info=error)
    return Failed(id=request_id, code="internal_error", message=f"{type(error).__name__}: {error}")
