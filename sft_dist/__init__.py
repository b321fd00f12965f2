"""Supervised fine-tuning of chat models with one loss curve on any number of devices."""

__version__ = "0.1.0"
