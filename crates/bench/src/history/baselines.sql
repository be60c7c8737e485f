-- A baseline of everybody above the history, as `person-api republish --all` appends them, and published. No program runs
-- meanwhile.
DO $$
DECLARE
    before bigint := (SELECT last_value FROM outbox.position);
    above  bigint := before + (SELECT count(*) FROM person.person WHERE cpf IS NOT NULL);
BEGIN
    WHILE (SELECT max(p.upper) FROM outbox.partition p) <= above LOOP
        PERFORM outbox.add_partition(greatest(pg_temp.persons(), 1000));
    END LOOP;
    -- A body of more than 16 MiB fits no event.
    INSERT INTO outbox.event (position, id, aggregate_type, aggregate_id, version, type, payload, headers, previous_id)
    SELECT before + n, pg_temp.baseline_id(id), 'person', id, version + 1, 'person.baseline', body, '{"baseline": true}',
           (SELECT a.last_event_id FROM outbox.aggregate a WHERE a.aggregate_type = 'person' AND a.aggregate_id = p.id::text)
    FROM (SELECT row_number() OVER (ORDER BY id) AS n, id, version FROM person.person WHERE cpf IS NOT NULL) p,
         LATERAL (SELECT row_to_json(body) AS body
                  FROM (SELECT o.id, o.cpf, o.name, o.address, o.date_of_birth, o.created_at, o.status,
                               ARRAY(SELECT row_to_json(item) FROM
                                     (SELECT i.id, i.type, trim_scale(i.value) AS value, i.created_at
                                      FROM person.income i WHERE i.person_id = o.id ORDER BY i.id) item) AS incomes,
                               ARRAY(SELECT row_to_json(item) FROM
                                     (SELECT i.id, i.type, trim_scale(i.value) AS value, i.created_at
                                      FROM person.asset i WHERE i.person_id = o.id ORDER BY i.id) item) AS assets,
                               ARRAY(SELECT row_to_json(item) FROM
                                     (SELECT i.id, trim_scale(i.value) AS value, i.created_at
                                      FROM person.debt i WHERE i.person_id = o.id ORDER BY i.id) item) AS debts
                        FROM person.person o WHERE o.id = p.id) body) b
    WHERE octet_length(body::text) <= 16777216;
    UPDATE person.person SET version = version + 1
    WHERE id IN (SELECT e.aggregate_id::uuid FROM outbox.event e WHERE e.position > before);
    UPDATE outbox.aggregate a
    SET version = e.version, previous_event_id = e.previous_id, last_event_id = e.id, last_position = e.position
    FROM outbox.event e
    WHERE e.position > before AND a.aggregate_type = e.aggregate_type AND a.aggregate_id = e.aggregate_id;
    PERFORM setval('outbox.position', above);
    UPDATE outbox.relay SET low_water = above, high = above, open = '{}';
END
$$;
