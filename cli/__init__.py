"""The command lines of mpcache and mptrain; thin, imported only by their entry points."""
