"""Full fine-tuning (every parameter, AdamW), and the head alone: the ceiling and the floor."""

from __future__ import annotations

from baselines.method import TASK_HEAD, LayerBytes, Method, size


class Full(Method):
    """Every parameter of the model trains, in either regime."""

    name = "full"

    def prepare(self, model, batches):
        """Let everything train."""
        self.check_model(model)
        model.requires_grad_(True)

    def formula(self, shape, tokens, dtype):
        """W, its gradient and two moments."""
        weight = size(shape[0] * shape[1], dtype)
        return LayerBytes(parameter=weight, gradient=weight, optimizer=2 * weight)


class Head(Method):
    """Only the head trains: the task's own head, or the output embeddings of a language model; in either regime."""

    name = "head"

    def prepare(self, model, batches):
        """Freeze everything but the head. A lone layer or block has no head: nothing trains."""
        self.check_model(model)
        head = {id(p) for name, p in model.named_parameters() if TASK_HEAD.search(name)}
        if not head and hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
            head = {id(p) for p in model.get_output_embeddings().parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in head)

    def formula(self, shape, tokens, dtype):
        """W alone: a frozen layer's backward needs no X."""
        return LayerBytes(parameter=size(shape[0] * shape[1], dtype), gradient=0, optimizer=0, keeps_input=False)
