"""Stage 3: the masked encoder over semantic IDs, pretrained on all domains and fine-tuned on one."""
