"""Engines, texts and tasks that measure a checkpoint's speed and quality; nothing here knows a study."""
