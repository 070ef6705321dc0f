"""Classifier-free guidance: text that follows its prompt more closely, or keeps away from another one."""
