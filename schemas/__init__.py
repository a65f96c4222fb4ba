"""What is stored and exchanged. Needs numpy and pyarrow only; imports nothing of this project."""
