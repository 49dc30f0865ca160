"""What every rank imports, loaded once: ranks are forked from a process that has it (see `processes`)."""

from __future__ import annotations

import importlib
import os

import torch

from qbrec.engine.ds_engine import import_deepspeed

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of compilers that would be forked with it
torch.set_num_threads(1)  # a thread pool does not survive a fork
import_deepspeed("cpu")
# `deepspeed.initialize` imports it, and with it torch's compiler: seconds.
importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
importlib.import_module("tests.fault.stage")
