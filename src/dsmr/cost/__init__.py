"""What training costs: operations, bytes, time; estimated and measured."""
