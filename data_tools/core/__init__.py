"""What every verb of `mmvit-data` needs: errors, files, output folders, workers, progress."""
