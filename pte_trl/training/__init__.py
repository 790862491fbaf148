"""GRPO and distillation on TRL's trainers."""
