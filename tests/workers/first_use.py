"""What a run imports or builds when it first needs it, half a second of work: the fork server does it once for all."""

import gc

import deepspeed
import deepspeed.module_inject.auto_ep_layer
import numpy.ctypeslib
import peft
import pydantic.dataclasses
import setuptools
import transformers.tokenization_utils_tokenizers
import transformers.trainer_utils
import typeguard
import tyro._backends._tyro_backend
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

__all__ = ["numpy", "peft", "pydantic", "setuptools", "transformers", "typeguard", "tyro"]  # imported, and no more

_ = deepspeed.ops.__compatible_ops__  # which operators can be built here
get_checkpoint_conversion_mapping("gpt2")  # compiles the patterns of all architectures
gc.freeze()  # no collection of a fork looks at what is here
