-- What score-projector has appended: an event for each item. The first four partitions were retired, so their events are
-- gone; nobody follows scores, so the relay dropped the events by rule.
SELECT pg_temp.partitions(pg_temp.persons() / 10 * 96 - 101);
BEGIN;
TRUNCATE outbox.event;
SELECT pg_temp.bare(VARIADIC ARRAY(SELECT ('outbox.' || name)::regclass FROM outbox.partition));
INSERT INTO outbox.event (position, id, aggregate_type, aggregate_id, version, type, payload, created_at, previous_id)
SELECT score_pos, pg_temp.score_event_id(person, version), 'score', id, version - 1, 'score.new', format(
           '{"id":"%s","person_id":"%s","cpf":%s,"type":"%s","value":%s,"score":%s,"total":%s,"created_at":%s}',
           pg_temp.item_id(pos), id, pg_temp.cpf(person), kind, pg_temp.value(person, kind), pg_temp.score(person, kind),
           pg_temp.total(person, version), to_json(pg_temp.at(pg_temp.ms(pos))))::json,
       pg_temp.at(pg_temp.ms(pos) + 30), pg_temp.score_event_id(person, version - 1)
FROM (SELECT score_pos, pos, person, version, pg_temp.person_id(person) AS id, pg_temp.kind(version) AS kind
      FROM (SELECT row_number() OVER (ORDER BY pos) AS score_pos, pos, person, version
            FROM (SELECT pos, person, pg_temp.version_at(pos, person) AS version
                  FROM (SELECT pos, pg_temp.person_at(pos) AS person
                        FROM generate_series(1, pg_temp.events()) pos OFFSET 0) a OFFSET 0) b
            WHERE version > 1) c
      WHERE score_pos > 4 * pg_temp.persons() OFFSET 0) d;
SELECT pg_temp.dress();
INSERT INTO outbox.aggregate (aggregate_type, aggregate_id, version, last_event_id, previous_event_id, last_position, state)
SELECT DISTINCT ON (e.aggregate_type, e.aggregate_id)
       e.aggregate_type, e.aggregate_id, e.version, e.id, e.previous_id, e.position, 'live'
FROM outbox.event e ORDER BY e.aggregate_type, e.aggregate_id, e.version DESC;
-- The chains whose events were all retired are there, too.
INSERT INTO outbox.aggregate (aggregate_type, aggregate_id, version, last_event_id, previous_event_id, last_position, state)
SELECT 'score', pg_temp.person_id(person), n - 1, pg_temp.score_event_id(person, n), pg_temp.score_event_id(person, n - 1),
       4 * pg_temp.persons(), 'live'
FROM (SELECT person, pg_temp.versions(person) AS n FROM generate_series(0, pg_temp.persons() + 100) person OFFSET 0) p
ON CONFLICT DO NOTHING;
INSERT INTO outbox.aggregate_type (aggregate_type, numbered_by) VALUES ('score', 'outbox');
SELECT setval('outbox.position', pg_temp.persons() / 10 * 96 - 101);
SELECT pg_temp.ages(pg_temp.persons() / 10 * 96 - 101, 106.0 / 96);
INSERT INTO outbox.relay (name, low_water, high, incarnation, dropped_by_rule)
VALUES ('default', pg_temp.persons() / 10 * 96 - 101, pg_temp.persons() / 10 * 96 - 101, 1,
        int8multirange(int8range(1, pg_temp.persons() / 10 * 96 - 100)));
COMMIT;
