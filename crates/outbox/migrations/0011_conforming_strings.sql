-- The partitions' bounds are read by patterns with backslashes. A session with standard_conforming_strings
-- off takes those for escapes: a view that such a session made found no bounds, so no partition was ever
-- added, and a function that it called numbered partitions wrongly. The view is made again, and what has
-- such a pattern in its body brings the setting along.
SET LOCAL standard_conforming_strings = on;

CREATE OR REPLACE VIEW outbox.partition AS
SELECT c.relname::text AS name,
       (regexp_match(b.bound, E'FROM \\(''(-?\\d+)''\\)'))[1]::bigint AS lower,
       (regexp_match(b.bound, E'TO \\(''(-?\\d+)''\\)'))[1]::bigint AS upper,
       b.bound = 'DEFAULT' AS is_default
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
CROSS JOIN LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid)) AS b (bound)
WHERE i.inhparent = 'outbox.event'::regclass;

ALTER FUNCTION outbox.add_partition(bigint) SET standard_conforming_strings = on;
