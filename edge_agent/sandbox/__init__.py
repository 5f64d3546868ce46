"""What an app may see, write and reach on a node."""
