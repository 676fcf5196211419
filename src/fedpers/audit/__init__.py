"""Audits: what an attacker's success on planted canaries says about a claimed epsilon."""
