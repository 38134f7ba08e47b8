"""Where pyobserver meets other frameworks; none of them is imported from here on its own account."""

from .hosts import register_with_hosts

__all__ = ["register_with_hosts"]
