"""Where the restarts begin: greedy k-means++ (`plus_plus`), k-means|| (`scalable`), random rows."""
