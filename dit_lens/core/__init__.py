"""From ops to a Run: runs < request < plan < execution < session; each file is imported by name."""
