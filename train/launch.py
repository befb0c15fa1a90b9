"""How fine-tuning is started (`launch_command`, for the pipeline) and how it finds itself started (`start`).

Three launchers, one choice: plain Python for one process, torchrun for several CPU processes, `accelerate launch`
for several GPUs or whatever a file written by `accelerate config` describes (FSDP, several machines).
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from conf.devices import NO_CUDA, pick_device
from conf.precision import computes_bfloat16
from conf.schema import Device, FinetuneConfig, LaunchConfig, Precision
from train.sharding import plugins


def launch_command(launch: LaunchConfig, module: str, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Command that runs `python -m module arguments` as `launch` asks, and what to add to its environment.

    What was decided is passed on as `launch.num_processes=N`, for `start` to compare with what it finds.
    Raises ValueError before anything starts if this machine cannot do it.
    """
    python = [sys.executable, "-m"]
    accelerate = [*python, "accelerate.commands.launch"]
    if launch.accelerate_config:
        if not Path(launch.accelerate_config).is_file():
            raise ValueError(f"launch.accelerate_config={launch.accelerate_config}: no such file")
        number = ["--num_processes", str(launch.num_processes)] if launch.num_processes else []
        return [*accelerate, "--config_file", launch.accelerate_config, *number, "-m", module, *arguments], {}

    processes, gpus = processes_and_gpus(launch)
    arguments = [word for word in arguments if not word.startswith("launch.num_processes=")]
    arguments.append(f"launch.num_processes={processes}")
    if processes == 1:
        return [*python, module, *arguments], {}
    if gpus:
        # Port 0 takes a free one: two runs on one machine must not meet. The training sets its own precision.
        options = ["--multi_gpu", "--num_machines", str(launch.num_machines)]
        options += ["--main_process_port", "0"] if launch.num_machines == 1 else meeting_point(launch)
        options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(processes)]
        return [*accelerate, *options, "-m", module, *arguments], {}
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // processes))
    meet = ["--standalone"]
    if launch.num_machines > 1:
        meet = ["--nnodes", str(launch.num_machines), "--node_rank", str(launch.machine_rank)]
        meet += ["--master_addr", str(launch.main_process_ip), "--master_port", str(launch.main_process_port)]
    here = str(processes // launch.num_machines)
    torchrun = [*python, "torch.distributed.run", *meet, "--nproc_per_node", here]
    return [*torchrun, "-m", module, *arguments], {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads}


def meeting_point(launch: LaunchConfig) -> list[str]:
    """Where the machines of one training find each other."""
    options = ["--machine_rank", str(launch.machine_rank), "--main_process_ip", str(launch.main_process_ip)]
    return [*options, "--main_process_port", str(launch.main_process_port)]


def processes_and_gpus(launch: LaunchConfig) -> tuple[int, int]:
    """Number of processes to start and of GPUs they use (0: they run on the CPU)."""
    gpus = 0 if launch.device is Device.cpu else torch.cuda.device_count()
    if launch.device is Device.cuda and not gpus:
        raise ValueError(NO_CUDA)
    processes = launch.num_processes or max(gpus, 1)
    if gpus and processes > gpus * launch.num_machines:
        raise ValueError(
            f"launch.num_processes={processes}, but torch sees {gpus} GPU{'s' * (gpus > 1)}; "
            f"ask for at most {gpus * launch.num_machines}, or for CPU processes with launch.device=cpu"
        )
    return processes, gpus


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(finetune: FinetuneConfig, launch: LaunchConfig) -> Accelerator:
    """The Accelerator of this process, after checking that the launch is the one that was asked for."""
    pick_device(launch.device)
    on_cpu = launch.device is Device.cpu or not torch.accelerator.is_available()
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if finetune.torch_compile and on_cpu and not any(map(shutil.which, compilers)):
        raise ValueError("finetune.torch_compile=true on the CPU needs a C++ compiler; install g++ or set it to false")
    accelerator = Accelerator(
        cpu=on_cpu,  # without it torchrun on the CPU would start that many unconnected trainings
        mixed_precision=mixed_precision(finetune.mixed_precision, on_cpu),
        dynamo_backend="inductor" if finetune.torch_compile else "no",
        # Buffers (rotary frequencies, indices) never change: broadcasting them before each forward is for nothing.
        **plugins(launch.sharding, finetune, on_cpu),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    check_processes(launch, accelerator.num_processes)
    gpus = 0 if on_cpu else torch.cuda.device_count()
    if gpus > 1 and accelerator.num_processes == 1 and not launch.num_processes:
        print(f"finetune: one process on one of {gpus} GPUs; `make finetune GPUS={gpus}` uses them all", flush=True)
    return accelerator


def mixed_precision(wanted: Precision, on_cpu: bool) -> str:
    """`bf16`, `fp16` or `no`. `auto` is bf16 where the hardware computes in it."""
    if wanted is Precision.fp16 and (on_cpu or not torch.cuda.is_available()):
        raise ValueError("finetune.mixed_precision=fp16 needs CUDA, which torch does not see; use bf16, no or auto")
    if wanted is not Precision.auto:
        return wanted.value
    return "bf16" if computes_bfloat16(on_cpu) else "no"


def check_processes(launch: LaunchConfig, found: int) -> None:
    """Some launches start fewer processes than asked for and say nothing: an error that shows the right command."""
    # `accelerate launch --cpu --num_processes 2` sets a port for two to meet at, then starts one, without a word
    # in the environment of how many it was asked for.
    alone = "WORLD_SIZE" not in os.environ and {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= set(os.environ)
    asked = launch.num_processes or os.environ.get("WORLD_SIZE") or ("several" if alone else found)
    if str(asked) == str(found):
        return
    example = LaunchConfig(num_processes=launch.num_processes or 2, device=launch.device)
    command, variables = launch_command(example, "train.finetune", ["..."])
    words = [f"{name}={value}" for name, value in variables.items()] + [shlex.quote(word) for word in command]
    raise ValueError(
        f"{asked} processes were asked for (launch.num_processes={launch.num_processes or 'null'}), but training "
        f"runs in {found}. Start it as\n  " + " ".join(words)
    )
