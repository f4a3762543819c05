"""Run the CUDA path without a GPU: tensors on cuda are fake, with shape, dtype and device but without values.

An operator that would fail for one of these three fails here. `Watch` notes where the CPU would wait for the GPU, and
the dtypes of matrix products. What this cannot show: kernels, NCCL, speed. For a process of its own, as torch must be
imported after the stub. Prints facts as JSON for test_cuda.py, or what the data sheets promise:

    python tests/fake_cuda.py plan
"""

import ctypes
import json
import math
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

TESTS = Path(__file__).parent
TORCH = Path(find_spec("torch").origin).parent
with tempfile.TemporaryDirectory() as folder:
    library = Path(folder) / "fake_cuda.so"
    argv = ["c++", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH}/include", str(TESTS / "fake_cuda.cpp"), "-o", library]
    subprocess.run([*argv, f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH}/lib"], check=True)
    ctypes.CDLL(str(library))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (before torch believes in a GPU)
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from torch.utils.weak import WeakIdKeyDictionary  # noqa: E402

sys.path.insert(0, str(TESTS.parent))
with patch("torch.inference_mode", torch.no_grad):  # in the other mode, a Watch does not see .item()
    import sample
import train  # noqa: E402
from config import read  # noqa: E402

aten = torch.ops.aten
NEED_VALUES = {aten._local_scalar_dense.default, aten.nonzero.default, aten.multinomial.default, aten.equal.default}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_dot_product_flash_attention.default}


class Watch(TorchDispatchMode):
    """Notes where the CPU waits for the GPU, dtypes and widths of matrix products and the most bytes on the GPU."""

    def __init__(self):
        super().__init__()
        self.waits, self.dtypes, self.widths, self.peak = [], set(), set(), 0
        self.alive = WeakIdKeyDictionary()  # bytes of each storage

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in inputs)
        if operator == aten._local_scalar_dense.default and inputs[0].constant is None:
            self.wait()
            return 2.0 if inputs[0].is_floating_point() else 0
        # Fake operators know no generator.
        output = operator(*args, **{name: value for name, value in (kwargs or {}).items() if name != "generator"})
        to_host = operator == aten._to_copy.default and output.device.type == "cpu"
        if on_gpu and (to_host or operator in NEED_VALUES):
            self.wait()
        if on_gpu and operator in PRODUCTS:
            self.dtypes.add(str(inputs[-1].dtype))
            self.widths.add(tree_leaves(output)[0].size(-1))
        outputs = [tensor for tensor in tree_leaves(output) if isinstance(tensor, torch.Tensor) and tensor.is_cuda]
        new = [s for s in (tensor.untyped_storage() for tensor in outputs) if s not in self.alive]
        if new:  # neither a view nor in place
            self.alive |= {storage: math.ceil(storage.nbytes() / 512) * 512 for storage in new}  # as torch allocates
            self.peak = max(self.peak, sum(self.alive.values()))
        return output

    def wait(self):
        frame = sys._getframe(1)
        while Path(frame.f_code.co_filename).parent != TESTS.parent:
            frame = frame.f_back
        self.waits.append(f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}")

    def tolist(self, tensor):
        """One copy to the host, where a fake tensor asks for each value by itself."""
        self.wait()
        return np.full(tensor.shape, 2.0).tolist()


def attention(q, k, v, dropout_p=0.0, is_causal=False):
    """The kernel that a GPU takes: without one, torch writes the T x T matrices."""
    if q.dtype == torch.float32:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout_p, is_causal)[0]
    return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


def move(module, device, dtype=None):
    """nn.Module.to, which cannot exchange fake parameters; tied ones stay tied."""
    moved = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter not in moved:
                moved[parameter] = torch.nn.Parameter(parameter.detach().to(device, dtype))
            part._parameters[name] = moved.get(parameter)
    return module


@contextmanager
def fake_gpu():
    """Within, there is one GPU. Yields what `Watch` notes."""
    watch = Watch()
    replaced = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.get_device_name": lambda device: "NVIDIA A100-SXM4-80GB",
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.manual_seed_all": lambda seed: None,
        "torch.nn.Module.to": move,
        "torch.nn.functional.scaled_dot_product_attention": attention,
        "torch.Tensor.pin_memory": lambda tensor: tensor,
        "torch._subclasses.fake_tensor.FakeTensor.tolist": lambda tensor: watch.tolist(tensor),
        "torch._subclasses.fake_tensor.FakeTensor.numpy": lambda tensor: np.zeros(tensor.shape, int),
        "torch._subclasses.fake_tensor.init_gpu_context": lambda device: None,
        "model.load_weights": torch.nn.Module.load_state_dict,  # which looks at no value
        "train.State.save": lambda *_: None,
        "train.Process.max_over_processes": lambda process, number: number,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(patch.object(FakeTensorMode, "avoid_device_init", property(lambda mode: True)))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watch)
        yield watch


def facts(argv):
    """What happens when the program `argv[0]` runs with the other arguments."""
    with fake_gpu() as watch:
        try:
            {"train": train.main, "sample": sample.main}[argv[0]](argv[1:])
        except Exception:
            return {"error": traceback.format_exc()}
    return {
        "waits": Counter(watch.waits),
        "dtypes": sorted(watch.dtypes),
        "widths": sorted(watch.widths),
        "peak": watch.peak,
        "error": None,
    }


class Work(TorchDispatchMode):
    """Notes FLOPs, and bytes read and written, of each operator."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        schema = operator._schema
        view = any(value.alias_info and not value.alias_info.is_write for value in schema.returns)
        if operator.namespace == "aten" and not view:
            count = flop_registry.get(operator.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=output) if count else 0
            specs = zip(args, schema.arguments, strict=False)
            changed = [arg for arg, spec in specs if spec.alias_info and spec.alias_info.is_write]
            tensors = [t for t in tree_leaves((args, kwargs, changed or output)) if isinstance(t, torch.Tensor)]
            self.done.append((flops, sum(t.nbytes for t in tensors)))
        return output


def training_step(recipe, rows):
    """Of a step with a micro-batch of `rows` sequences: the config, FLOPs a token, work done, bytes at the peak."""
    config = read(train.TrainConfig, [f"{TESTS.parent}/config/{recipe}", f"--batch_size={rows}", "--dataset=none",
                                      "--gradient_accumulation_steps=1", "--out_dir=none"])  # fmt: skip
    with fake_gpu() as watch, patch("train.show"):
        process = train.join_processes(config)
        model = train.GPT(config.model_config(50257 if "gpt2" in recipe else 65)).to(process.device)
        state = train.new_state(model, {}, config, process)
        ids = torch.zeros(rows, config.block_size, dtype=torch.long, device=process.device)
        with patch("train.batch", lambda *_: (ids, ids)):
            train.train_step(state.model, state, None, config, process)  # makes the optimizer's state
            with Work() as work:
                train.train_step(state.model, state, None, config, process)
    return config, state.model.flops_per_token(), work.done, watch.peak


def plan():
    """Print a roofline estimate: each operator takes the larger of FLOPs / peak FLOP/s and bytes / bandwidth.

    The lower time counts matrix products and attention alone, as if all else were fused into them.
    """
    cards = {"A100": (312e12, 2.04e12), "H100": (989e12, 3.35e12)}  # SXM, 80 GB: FLOP/s in bfloat16, bytes a second
    print("| recipe | micro-batch | FLOPs a token | operators | memory | A100 | MFU | H100 | MFU |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for recipe, sizes in (("shakespeare_char_nanogpt.py", (8, 64)), ("gpt2_124m.py", (16, 32, 64))):
        for rows in sizes:
            config, flops_per_token, done, peak = training_step(recipe, rows)
            cells = [recipe, f"{rows} x {config.block_size}", f"{flops_per_token / 1e6:.1f}M", str(len(done))]
            cells += [f"{peak / 1e9:.1f} GB"]
            for flop_rate, byte_rate in cards.values():
                times = [max(flops / flop_rate, n_bytes / byte_rate) for flops, n_bytes in done]
                unfused, fused = sum(times), sum(t for t, (flops, _) in zip(times, done, strict=True) if flops)
                best = flops_per_token * rows * config.block_size / flop_rate
                cells += [
                    f"{fused * 1e3:.1f} to {unfused * 1e3:.1f} ms",
                    f"{best / fused:.0%} to {best / unfused:.0%}",
                ]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if sys.argv[1] == "plan":
        sys.exit(plan())
    found = {name: facts(argv) for name, argv in json.loads(sys.argv[1]).items()}
    print(json.dumps(found))
