"""Other ways to compute what titok computes, to measure it against."""
