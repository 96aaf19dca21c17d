"""What every other folder uses: errors, settings, small matrices, devices, words and tables, files, model inputs."""
