"""Published methods for any module: their settings by name, and what they need beyond rows and strips."""
