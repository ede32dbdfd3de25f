"""Trained models as pipelines of diffusers; imported as `tvmatch.diffusers`."""
