"""Recovery methods: a file each, found by its name, with ``prepare_``.

    def prepare_(model, settings): ...

marks the weights that are trained by ``requires_grad`` and returns the model to train: the same, or
one around it that has ``merge_and_unload``. It raises UserError if there is nothing to train.
"""
