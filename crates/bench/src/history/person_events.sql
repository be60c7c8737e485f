-- What person-api has appended, and the relay has published.
SELECT pg_temp.partitions(pg_temp.events());
BEGIN;
-- In the transaction that empties the tables, rows need no log (wal_level minimal).
TRUNCATE outbox.event;
SELECT pg_temp.bare(VARIADIC ARRAY(SELECT ('outbox.' || name)::regclass FROM outbox.partition));
INSERT INTO outbox.event (position, id, aggregate_type, aggregate_id, version, type, payload, created_at, previous_id)
SELECT pos, pg_temp.event_id(pos), 'person', id, version, kind || '.new',
       (CASE kind WHEN 'person' THEN body ELSE format(
            '{"id":"%s","person_id":"%s",%s"value":%s,"created_at":%s,"person":%s}', pg_temp.item_id(pos), id,
            CASE kind WHEN 'income' THEN '"type":"renting",' WHEN 'asset' THEN '"type":"apartment",' END,
            pg_temp.value(person, kind), to_json(at), body) END)::json,
       at, pg_temp.person_event_id(person, version - 1)
FROM (SELECT pos, person, version, id, kind, pg_temp.at(pg_temp.ms(pos)) AS at, format(
          '{"id":"%s","cpf":%s,"name":"%s","address":"%s","date_of_birth":%s,"created_at":%s,"status":"active"}',
          id, pg_temp.cpf(person), pg_temp.name(person), pg_temp.address(person), to_json(pg_temp.born(person)),
          to_json(pg_temp.created_at(person))) AS body
      FROM (SELECT pos, person, version, pg_temp.person_id(person) AS id, pg_temp.kind(version) AS kind
            FROM (SELECT pos, person, pg_temp.version_at(pos, person) AS version
                  FROM (SELECT pos, pg_temp.person_at(pos) AS person
                        FROM generate_series(1, pg_temp.events()) pos OFFSET 0) a OFFSET 0) b OFFSET 0) c OFFSET 0) d;
SELECT pg_temp.dress();
INSERT INTO outbox.aggregate (aggregate_type, aggregate_id, version, last_event_id, previous_event_id, last_position, state)
SELECT 'person', pg_temp.person_id(person), n, pg_temp.person_event_id(person, n), pg_temp.person_event_id(person, n - 1),
       pg_temp.position_of(person, n), 'live'
FROM (SELECT person, pg_temp.versions(person) AS n FROM generate_series(0, pg_temp.persons() + 100) person OFFSET 0) p;
INSERT INTO outbox.aggregate_type (aggregate_type, numbered_by) VALUES ('person', 'writer');
SELECT setval('outbox.position', pg_temp.events());
SELECT pg_temp.ages(pg_temp.events(), 1);
INSERT INTO outbox.relay (name, low_water, high, incarnation) VALUES ('default', pg_temp.events(), pg_temp.events(), 1);
COMMIT;
