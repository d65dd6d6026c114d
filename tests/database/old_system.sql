-- The database of the system before, as a migration by hand left it: SERIAL ids, its own index names, a counter trigger
-- for each row, rates in percent, columns that were filled only later, and other systems beside it.

CREATE TABLE sites (
    id SERIAL PRIMARY KEY,
    site_id VARCHAR(255) UNIQUE NOT NULL,
    clinic_name VARCHAR(255) NOT NULL,
    contact_email VARCHAR(255),
    healing_tier VARCHAR(20) DEFAULT 'standard',
    created_at TIMESTAMPTZ DEFAULT NOW()
);

CREATE TABLE appliances (
    id SERIAL PRIMARY KEY,
    appliance_id VARCHAR(255) UNIQUE NOT NULL,
    site_id VARCHAR(255) NOT NULL REFERENCES sites (site_id),
    agent_version VARCHAR(20),
    last_checkin TIMESTAMP,  -- without a zone, in UTC
    status VARCHAR(50) DEFAULT 'active',
    created_at TIMESTAMPTZ DEFAULT NOW()
);

CREATE TABLE execution_telemetry (
    id SERIAL PRIMARY KEY,
    execution_id VARCHAR(255) NOT NULL,
    incident_id VARCHAR(255),
    site_id VARCHAR(255) NOT NULL,
    appliance_id VARCHAR(255) NOT NULL,
    runbook_id VARCHAR(255) NOT NULL,
    hostname VARCHAR(255) NOT NULL,
    platform VARCHAR(50),
    incident_type VARCHAR(100),
    started_at TIMESTAMPTZ,
    completed_at TIMESTAMPTZ,
    duration_seconds FLOAT,
    success BOOLEAN NOT NULL,
    status VARCHAR(50) NOT NULL,
    verification_passed BOOLEAN,
    confidence REAL,
    resolution_level VARCHAR(10),
    state_before JSONB,
    state_after JSONB,
    state_diff JSONB,
    executed_steps JSONB,
    error_message TEXT,
    error_step INTEGER,
    error_traceback TEXT,
    failure_type VARCHAR(100),
    retry_count INTEGER DEFAULT 0,
    was_correct_runbook BOOLEAN,
    was_correct_diagnosis BOOLEAN,
    manual_intervention_needed BOOLEAN DEFAULT FALSE,
    human_feedback TEXT,
    evidence_bundle_id VARCHAR(255),
    tags JSON,
    created_at TIMESTAMPTZ DEFAULT NOW(),
    -- later
    cost_usd DECIMAL(10, 6),
    input_tokens INTEGER,
    output_tokens INTEGER,
    pattern_signature VARCHAR(255),
    reasoning TEXT,
    chaos_campaign_id VARCHAR(255),
    ingest_node TEXT NOT NULL DEFAULT 'central-1',
    CONSTRAINT uq_execution_telemetry_execution_id UNIQUE (execution_id)
);
CREATE INDEX idx_execution_telemetry_site ON execution_telemetry (site_id);
CREATE INDEX idx_execution_telemetry_runbook ON execution_telemetry (runbook_id, created_at DESC);
CREATE INDEX idx_execution_telemetry_failed ON execution_telemetry (failure_type) WHERE NOT success;

CREATE TABLE patterns (
    id SERIAL PRIMARY KEY,
    pattern_id VARCHAR(64) UNIQUE NOT NULL,
    pattern_signature VARCHAR(255) UNIQUE NOT NULL,
    description TEXT,
    incident_type VARCHAR(100) NOT NULL,
    runbook_id VARCHAR(255),
    proposed_rule TEXT,
    occurrences INTEGER DEFAULT 1,
    success_count INTEGER DEFAULT 0,
    failure_count INTEGER DEFAULT 0,
    success_rate FLOAT GENERATED ALWAYS AS (
        CASE WHEN occurrences > 0 THEN (success_count::FLOAT / occurrences::FLOAT) * 100 ELSE 0 END
    ) STORED,
    avg_resolution_time_ms INTEGER,
    total_resolution_time_ms BIGINT DEFAULT 0,
    status VARCHAR(20) DEFAULT 'pending' CHECK (status IN ('pending', 'approved', 'promoted')),
    promoted_at TIMESTAMPTZ,
    promoted_to_rule_id VARCHAR(100),
    example_incidents JSONB,
    first_seen TIMESTAMPTZ DEFAULT NOW(),
    last_seen TIMESTAMPTZ DEFAULT NOW(),
    created_at TIMESTAMPTZ DEFAULT NOW()
);
CREATE INDEX idx_patterns_status ON patterns (status);

CREATE TABLE l1_rules (
    id SERIAL PRIMARY KEY,
    rule_id VARCHAR(100) UNIQUE NOT NULL,
    incident_pattern JSONB NOT NULL,
    runbook_id VARCHAR(255),
    confidence FLOAT DEFAULT 0.9,
    promoted_from_l2 BOOLEAN DEFAULT FALSE,
    enabled BOOLEAN DEFAULT TRUE,
    created_at TIMESTAMPTZ DEFAULT NOW(),
    match_count INTEGER DEFAULT 0,
    success_count INTEGER DEFAULT 0,
    failure_count INTEGER DEFAULT 0,
    success_rate FLOAT GENERATED ALWAYS AS (
        CASE WHEN match_count > 0 THEN (success_count::FLOAT / match_count::FLOAT) * 100 ELSE 0 END
    ) STORED,
    source VARCHAR(50),
    updated_at TIMESTAMPTZ DEFAULT NOW()
);
CREATE INDEX idx_l1_rules_enabled ON l1_rules (enabled) WHERE enabled;
CREATE INDEX idx_l1_rules_rate ON l1_rules (success_rate DESC);

CREATE TABLE appliance_commands (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    appliance_id VARCHAR(255) NOT NULL,
    command_type VARCHAR(100) NOT NULL,
    params JSONB DEFAULT '{}',
    status VARCHAR(50) DEFAULT 'pending',
    created_at TIMESTAMPTZ DEFAULT NOW(),
    delivered_at TIMESTAMPTZ,
    acknowledged_at TIMESTAMPTZ,
    expires_at TIMESTAMPTZ DEFAULT NOW() + INTERVAL '24 hours',
    CONSTRAINT appliance_commands_once UNIQUE (appliance_id, command_type, params),
    CONSTRAINT appliance_commands_state CHECK (status IN ('pending', 'delivered', 'acknowledged', 'failed'))
);

CREATE TABLE evidence_bundles (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    bundle_id VARCHAR(255) UNIQUE NOT NULL,
    appliance_id VARCHAR(255) NOT NULL,
    order_id VARCHAR(255),
    incident_id VARCHAR(255),
    check_type VARCHAR(100) NOT NULL,
    outcome VARCHAR(50),
    pre_state JSONB,
    post_state JSONB,
    actions_taken JSONB,
    timestamp_start TIMESTAMPTZ,
    timestamp_end TIMESTAMPTZ,
    signature TEXT,
    created_at TIMESTAMPTZ DEFAULT NOW()
);
CREATE INDEX idx_evidence_appliance ON evidence_bundles (appliance_id, created_at);

CREATE TABLE runbooks (
    id SERIAL PRIMARY KEY,
    runbook_id VARCHAR(50) UNIQUE NOT NULL,
    name VARCHAR(255),
    description TEXT,
    category VARCHAR(50),
    check_type VARCHAR(50),
    platform VARCHAR(20),
    severity VARCHAR(20) DEFAULT 'medium',
    is_disruptive BOOLEAN DEFAULT FALSE,
    requires_maintenance_window BOOLEAN DEFAULT FALSE,
    hipaa_controls TEXT[],
    version VARCHAR(20) DEFAULT '1.0',
    steps JSONB DEFAULT '[]',
    enabled BOOLEAN DEFAULT TRUE
);
INSERT INTO runbooks (runbook_id, name, category, platform, hipaa_controls) VALUES
    ('RB-WIN-SEC-001', 'Firewall', 'firewall', 'windows', ARRAY['164.312(a)(1)', '164.312(e)(1) [technical], "quoted"']),
    ('LIN-SSH-001', NULL, 'ssh', 'linux', NULL),
    ('RB-WIN-OWN-001', 'One of ours', 'custom', 'windows', '{}');

-- The counters: a trigger for each row that knows the ids of l1_rules only, and counts every INSERT.
CREATE FUNCTION bump_rule(which TEXT, worked BOOLEAN) RETURNS VOID LANGUAGE plpgsql AS $$
BEGIN
    UPDATE l1_rules SET match_count = match_count + 1,
        success_count = success_count + CASE WHEN worked THEN 1 ELSE 0 END,
        failure_count = failure_count + CASE WHEN worked THEN 0 ELSE 1 END
    WHERE rule_id = which;
END $$;

CREATE FUNCTION update_l1_rule_counters() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.resolution_level = 'L1' THEN
        PERFORM bump_rule(NEW.runbook_id, NEW.success);
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION update_l1_rule_counters() IS 'counts 100 % of what it counts';
CREATE TRIGGER trg_l1_rule_counters AFTER INSERT ON execution_telemetry
    FOR EACH ROW EXECUTE FUNCTION update_l1_rule_counters();

CREATE FUNCTION touch_updated_at() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at = NOW();
    RETURN NEW;
END $$;
CREATE TRIGGER l1_rules_updated_at BEFORE UPDATE ON l1_rules FOR EACH ROW EXECUTE FUNCTION touch_updated_at();

-- Other systems.
CREATE SCHEMA portal;
CREATE TABLE portal.tickets (
    id SERIAL PRIMARY KEY,
    execution INTEGER NOT NULL REFERENCES execution_telemetry (id) ON DELETE CASCADE,
    rule_id VARCHAR(100) REFERENCES l1_rules (rule_id),
    updated_at TIMESTAMPTZ
);
CREATE TRIGGER tickets_updated_at BEFORE UPDATE ON portal.tickets FOR EACH ROW EXECUTE FUNCTION touch_updated_at();

CREATE TABLE rule_audit (rule_id VARCHAR(100), was BOOLEAN, became BOOLEAN, at TIMESTAMPTZ DEFAULT NOW());
CREATE FUNCTION audit_rule() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO rule_audit (rule_id, was, became) VALUES (NEW.rule_id, OLD.enabled, NEW.enabled);
    RETURN NULL;
END $$;
CREATE TRIGGER audit_rule AFTER UPDATE ON l1_rules FOR EACH ROW EXECUTE FUNCTION audit_rule();

CREATE VIEW rule_rates AS SELECT rule_id, success_rate, confidence FROM l1_rules WHERE rule_id NOT LIKE '%test%';
CREATE VIEW portal.slow_executions WITH (security_barrier) AS
    SELECT execution_id, incident_type, confidence, tags ->> 'lab' AS lab FROM execution_telemetry WHERE duration_seconds > 30;
COMMENT ON VIEW portal.slow_executions IS 'for the portal';
COMMENT ON COLUMN portal.slow_executions.lab IS 'which lab';
CREATE VIEW portal.slow_types AS SELECT incident_type, count(*) AS n FROM portal.slow_executions GROUP BY incident_type;
