-- What the consumers have applied of the baselines: the same rows, one version higher.
CREATE TEMPORARY TABLE baseline AS
SELECT aggregate_id, pg_temp.v7(pg_temp.ms(pg_temp.events()), row_number() OVER (ORDER BY aggregate_id), 80) AS id
FROM inbox.aggregate WHERE consumer = 'score';
ANALYZE baseline;
UPDATE inbox.aggregate a SET version = version + 1, recent = pg_temp.short(b.id), last_event_id = b.id
FROM baseline b WHERE b.aggregate_id = a.aggregate_id;
UPDATE score.person SET version = version + 1;
UPDATE score_shadow.person SET version = version + 1;
