"""Audit: which figures of a document hold, which do not and why, and which layouts come nearest."""

from meshwright.audit.report import AuditReport, Checked, audit

__all__ = ["AuditReport", "Checked", "audit"]
