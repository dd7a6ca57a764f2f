"""Typed errors. Each says what happened, where, why, and what to declare or change."""


class RewriteError(RuntimeError):
    """What the library refuses, or what went wrong inside it.

    what:   one sentence, the event
    where:  the block (qualified module name) and, where known, the source line
    why:    the reason
    remedy: what the user can declare or change
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        self.what, self.where, self.why, self.remedy = what, where, why, remedy
        lines = [what]
        for label, text in (("where", where), ("why", why), ("remedy", remedy)):
            if text:
                lines.append(f"  {label}: {text}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.why, self.remedy)


class BoxError(RewriteError):
    """A box (ONNX model, callable) that cannot be loaded, was called wrongly, or failed."""


class RewriteWarning(UserWarning):
    """Something works, but not as well as the user may believe."""


def _rebuild(kind: type[RewriteError], what: str, where: str, why: str, remedy: str) -> RewriteError:
    return kind(what, where=where, why=why, remedy=remedy)
