"""Where pyobserver meets other frameworks; none of them is imported from here by itself."""

from .hosts import register_with_hosts

__all__ = ["register_with_hosts"]
