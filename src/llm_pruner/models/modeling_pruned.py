"""A model whose layers have sizes of their own.

Its code is that of transformers, or of the folder, which builds it as large as it was before
pruning. Then the layers that were removed are taken out, and each tensor gets the size that it has
in this folder. Which these are is in config.json under ``pruned``: text and numbers, read here and
nowhere else.
"""

import copy
from functools import reduce

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class Pruned:
    """Stands before the class of a model and gives it other sizes."""

    def __init__(self, config, *inputs, **options):
        recipe = config.pruned
        hidden = hide(config)
        kept = {path: get(config, path) for path in recipe["dense_config"]}
        for path, value in recipe["dense_config"].items():
            put(config, path, value)
        super().__init__(config, *inputs, **options)
        # What this module alone reads differently is set on a copy of its own, by ``_finish``.
        own = recipe["attributes"].get("", {})
        set_config_(self, {path: kept[path] for path in kept if f"config.{path}" not in own})
        vars(config).update(hidden)
        self._cut()
        self._unfinished = True
        # Where tensors are made without values, ``initialize_weights`` finishes, with the weights.
        if not any(one.is_meta for one in (torch.empty(0), *self.buffers())):
            self._finish()
            self.tie_weights()
            if config._attn_implementation == "vllm":
                tell_vllm_(config, self)

    def initialize_weights(self):
        """Fill what no checkpoint holds: loading comes here once it has the weights."""
        unfinished = vars(self).get("_unfinished")
        hidden = hide(self.config) if unfinished else {}
        super().initialize_weights()
        vars(self.config).update(hidden)
        if unfinished:
            self._finish()

    def set_attn_implementation(self, *given, **options):
        """Set it for layers, too, whose config is their own since it says their sizes."""
        super().set_attn_implementation(*given, **options)
        self._tell_layers()

    def set_experts_implementation(self, *given, **options):
        super().set_experts_implementation(*given, **options)
        self._tell_layers()

    def _tell_layers(self):
        named = ("_attn_implementation_internal", "_experts_implementation_internal")
        models = [one for one in self.modules() if isinstance(one, PreTrainedModel)]
        shared = {type(one.config): vars(one.config) for one in reversed(models)}
        for module in self.modules():
            own = vars(module).get("config")
            if isinstance(own, PreTrainedConfig) and type(own) in shared:
                said = shared[type(own)]
                vars(own).update({name: said[name] for name in named if name in said})

    @classmethod
    def is_custom_code(cls):
        """Whether weights are named and arranged by code of a folder, not by transformers."""
        return not cls._stock().__module__.startswith("transformers.")

    @classmethod
    def _can_set_experts_implementation(cls):
        """Whether the class of transformers can, which looks into the file of a class to know."""
        return cls._stock()._can_set_experts_implementation()

    @classmethod
    def _stock(cls):
        models = [one for one in cls.__mro__ if issubclass(one, PreTrainedModel)]
        return next(one for one in models if not issubclass(one, Pruned))

    def _recipe(self):
        """Return what is to be changed, by the names that it has in this model."""
        recipe = self.config.pruned
        buffers = {
            name: {int(dim): positions(kept) for dim, kept in dims.items()}
            for name, dims in recipe["buffers"].items()
        }
        layers = {name: positions(kept) for name, kept in recipe["layers"].items()}
        shapes = {name: [*map(int, text.split("x"))] for name, text in recipe["shapes"].items()}
        parts = {"layers": layers, "shapes": shapes, "buffers": buffers}
        return within(self, parts | {"attributes": recipe["attributes"]})

    def _cut(self):
        recipe = self._recipe()
        for path, kept in recipe["layers"].items():
            children = self.get_submodule(path)
            shorter = copy.copy(children)
            shorter._modules = {str(new): children[old] for new, old in enumerate(kept)}
            put(self, path, shorter)
        reshape_parameters_(self, recipe["shapes"])
        cut_buffers_(self, recipe["buffers"], saved=True)

    def _finish(self):
        recipe, self._unfinished = self._recipe(), False
        cut_buffers_(self, recipe["buffers"], saved=False)  # just computed, in dense size
        for name, values in recipe["attributes"].items():
            for path, value in values.items():
                set_own_(self.get_submodule(name), path, value)


def hide(config):
    """Take out and return what no module is to read while all is as large as before pruning."""
    hidden = {"pruned": vars(config).pop("pruned")}
    if vars(config).get("allow_global_per_layer_attribute_access"):  # heads per layer are ours
        hidden["_heterogeneity_spec"] = vars(config).pop("_heterogeneity_spec", None)
    return {key: value for key, value in hidden.items() if value is not None}


def positions(text):
    """Return the numbers of ranges such as ``0-31,40``."""
    ends = [part.split("-") for part in text.split(",")]
    return [i for part in ends for i in range(int(part[0]), int(part[-1]) + 1)]


def within(model, parts):
    """Return the same by the names of the model without its head, if that is what ``model`` is."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model and any(n.startswith(prefix) for n in parts["shapes"]):
        parts = {
            part: {n.removeprefix(prefix): value for n, value in of.items() if n.startswith(prefix)}
            for part, of in parts.items()
        }
    return parts | {"shapes": with_own_rows(model, parts["shapes"])}


def with_own_rows(model, shapes):
    """Return shapes with a row for each token: embeddings may have been resized since."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    rows = {
        f"{name}.{key}": weight.shape[0]
        for name, module in model.named_modules()
        if any(module is end for end in ends)
        for key, weight in module.named_parameters(recurse=False)
    }
    return {
        name: type(shape)((rows.get(name, shape[0]), *shape[1:])) for name, shape in shapes.items()
    }


def tell_vllm_(config, model):
    """Say in the config how wide the experts of each layer are: vLLM takes memory by that."""
    widths = {
        int(next(filter(str.isdecimal, path.split(".")))): experts.down_proj[0].numel()
        for path, experts in model.named_modules()
        if path.endswith(".experts") and hasattr(experts, "down_proj")
    }
    if len({*widths.values()}) > 1:
        layers = range(config.num_hidden_layers)
        key = "moe_" * hasattr(config, "moe_intermediate_size") + "intermediate_size"
        vars(config)[key] = [widths.get(layer, 0) // config.hidden_size for layer in layers]


def get(holder, path):
    """Return the value at a dotted path."""
    return reduce(getattr, path.split("."), holder)


def put(holder, path, value):
    """Set the value at a dotted path."""
    *inner, name = path.split(".")
    setattr(reduce(getattr, inner, holder), name, value)


def set_config_(model, values):
    """Set config values, also in the copies that modules hold of the config."""
    for path, value in values.items():
        old, name = get(model.config, path), path.split(".")[-1]
        put(model.config, path, value)
        for module in model.modules():
            config = vars(module).get("config")
            if isinstance(config, PreTrainedConfig) and getattr(config, name, None) == old:
                setattr(config, name, value)


def reshape_parameters_(model, shapes):
    """Keep the first entries of parameters along each dimension; the weights are loaded later."""
    for path, shape in shapes.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, name)
        if hasattr(old, "ds_id"):
            raise ValueError(
                "a model with layers of different sizes cannot be loaded under DeepSpeed ZeRO-3, "
                "which splits weights before they have their sizes; use ZeRO-2"
            )
        new = nn.Parameter(old.data[tuple(map(slice, shape))].clone(), old.requires_grad)
        vars(new).update(vars(old))  # marks that loaders leave on parameters
        setattr(module, name, new)
        if name == "weight" and isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape  # quantizers make theirs of them


def cut_buffers_(model, buffers, saved):
    """Keep some positions of the buffers that files hold, or of all others."""
    held = model.state_dict().keys()
    for path, dims in buffers.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if (path in held) == saved:
            tensor = getattr(module, name)
            for dim, kept in dims.items():
                tensor = tensor.index_select(dim, torch.tensor(kept, device=tensor.device))
            setattr(module, name, tensor)


def set_own_(module, path, value):
    """Set ``name``, ``name.3`` or ``config.name`` on the module's own copy of what holds it."""
    key, _, inner = path.partition(".")
    value = tuple(value) if isinstance(value, list) else value
    if inner:
        holder = copy.copy(vars(module)[key])
        if isinstance(holder, (tuple, list)):
            index = int(inner)
            holder = type(holder)([*holder[:index], value, *holder[index + 1 :]])
        else:
            vars(holder)[inner] = value
        value = holder
    vars(module)[key] = value
