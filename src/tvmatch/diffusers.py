"""Trained models as pipelines of diffusers: `from tvmatch.diffusers import TVMPipeline`."""

from tvmatch.errors import InputError

try:
    # diffusers recognises a model that it loads by the ModelMixin of the library that has the model's class.
    from diffusers import ModelMixin

    from tvmatch.interop.diffusers.pipeline import TVMPipeline
    from tvmatch.interop.diffusers.transformer import TVMTransformer
except ModuleNotFoundError as error:
    raise InputError(
        "tvmatch.diffusers", f'needs the package {error.name}, pip install "tvmatch[latents]"'
    ) from None

__all__ = ["ModelMixin", "TVMPipeline", "TVMTransformer"]
