"""What everything stands on: the processes (`world`), small files (`files`), pictures, the user's own modules."""
