"""What both sides write down: records as JSON, arrays by their bytes."""

import hashlib
import re


def arrays(record):
    return {name: [a.dtype, list(a.shape), digest(a.numpy().tobytes())] for name, a in record.items()}


def content(records):
    found = {}
    for name, record in records.items():
        if type(record).__name__ == "ArrayRecord":
            found[name] = arrays(record)
        else:
            found[name] = {"kind": type(record).__name__, **{k: value(v) for k, v in record.items()}}
    return found


def digest(data):
    return hashlib.sha256(data).hexdigest()


def value(v):
    if isinstance(v, list):
        return [value(each) for each in v]
    return f"bytes:{digest(v)}" if isinstance(v, bytes) else repr(v)


def reply(message):
    if message.has_error():
        reason = re.split(r"[\n(]", message.error.reason or "")[0].strip()
        return {"node": message.metadata.src_node_id, "error": message.error.code, "reason": reason}
    return {"node": message.metadata.src_node_id, "content": content(message.content)}


def histories(result):
    return {
        name: {str(n): {k: value(v) for k, v in record.items()} for n, record in getattr(result, name).items()}
        for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")
    }
