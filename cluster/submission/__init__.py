"""Jobs on a cluster from anywhere: what is uploaded, the job server, following a log, what a job tells of its run."""
