"""Validate: how much worse than its checkpoint is a bundle, where, and may it ship?"""
