nohup: failed to run command './h.sh': No such file or directory
